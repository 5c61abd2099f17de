#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine, with token authentication, until Ctrl-C.
#
#   cluster/local.sh            then, in another terminal, the `export` lines that it prints
#
# For trying what a cluster does (jobs, placement, the loss of a node) without one. It stops only the two processes that
# it started, never another Ray. Settings, by environment: PORT (of the head; the one after it is used too),
# DASHBOARD_PORT, CPUS (of each node), RAY (the command), FOLDER (for sockets and logs; a short path, because a socket's
# ends at 107 characters).
set -euo pipefail

PORT=${PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
CPUS=${CPUS:-1}
RAY=${RAY:-$([ -x .venv/bin/ray ] && echo "$PWD/.venv/bin/ray" || echo ray)}
FOLDER=${FOLDER:-$(mktemp -d /tmp/ray-local-XXXXXX)}

# Ray writes its token readable for all; written here first, it is this user's alone.
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    mkdir -p "$(dirname "$token")"
    if [ ! -s "$token" ]; then (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token"); fi
    chmod 600 "$token"
fi
export PATH=$(dirname "$(command -v "$RAY")"):$PATH # a job's `python` is the one beside `ray`
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-30}
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # stop at once, also with work on the nodes
unset RAY_ADDRESS

if [ "$(uname)" = Linux ]; then
    # Serving goes through HAProxy (seven times Ray's own proxy). Its files default to one place for the whole machine.
    mkdir -p "$FOLDER/haproxy"
    export RAY_SERVE_ENABLE_HA_PROXY=1
    export RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=$FOLDER/haproxy/haproxy.cfg
    export RAY_SERVE_HAPROXY_SOCKET_PATH=$FOLDER/haproxy/admin.sock
    export RAY_SERVE_HAPROXY_SERVER_STATE_BASE=$FOLDER/haproxy
    export RAY_SERVE_HAPROXY_SERVER_STATE_FILE=$FOLDER/haproxy/state
fi

started=()
stop() {
    trap - EXIT
    trap '' INT TERM # a second Ctrl-C must not leave a node behind
    kill "${started[@]}" 2>/dev/null || true
    wait "${started[@]}" 2>/dev/null || true
    rm -rf "$FOLDER"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Starts one node and waits until it is up. The dashboard (and with it the job server) listens on loopback. Ray's own
# ports between nodes listen on all interfaces whatever one asks for; the token guards them. All ports but three are the
# system's choice, so that several Rays fit on a machine.
node() { # its name, then more arguments of `ray start`
    local log=$FOLDER/$1.log
    : >"$log"
    "$RAY" start --block --node-ip-address=127.0.0.1 --num-cpus="$CPUS" --object-store-memory=500000000 \
        --temp-dir="$FOLDER/$1" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 \
        "${@:2}" >"$log" 2>&1 </dev/null &
    started+=($!)
    until grep -q 'Ray runtime started' "$log"; do
        if ! kill -0 $! 2>/dev/null; then
            echo "error: the $1 did not start; its log ends with:" >&2
            tail -15 "$log" >&2
            exit 1
        fi
        sleep 0.2
    done
}

node head --head --port="$PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" --ray-client-server-port=$((PORT + 1))
node worker --address="127.0.0.1:$PORT"

cat <<EOF
Two nodes are up, $CPUS CPU each; token authentication is on. In another terminal:

export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT

    raylway submit jobs/flights.yaml --set storage=\$PWD/runs
    ray job submit --working-dir . --runtime-env cluster/runtime-env.yaml -- python -m raylway run jobs/flights.yaml --set storage=\$PWD/runs

Ctrl-C here stops both nodes.
EOF
wait -n "${started[@]}"
echo "error: a node ended by itself; stopping the other" >&2
exit 1
