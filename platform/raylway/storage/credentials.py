"""Addresses that hold secrets are refused before anything writes or shows them."""

from __future__ import annotations

import re

from raylway.errors import UserError

_VARIABLES = {
    "s3": "the environment, such as AWS_ACCESS_KEY_ID",
    "gs": "the environment, such as GOOGLE_APPLICATION_CREDENTIALS",
    "https": "~/.netrc, or the file that NETRC names",
    "http": "nowhere: http:// is not encrypted",
}
_SECRET_KEY = (
    r"(?i)(^|[&;])(x-(amz|goog)-[a-z-]*|signature|sig|awsaccesskeyid|googleaccessid"
    r"|[a-z_-]*(token|key|secret|password|passwd|pwd|auth|jwt|credentials?))="
)


def refuse_credentials(address: str, where: str) -> None:
    """An address goes into the run record, so it must not let anyone in.

    Raises:
        UserError: It holds a password or a signature; the message does not show it.
    """
    scheme, separator, rest = address.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _VARIABLES:
        return
    # a secret may hold / ? and #, so a colon that is not before a port gives it away too
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user = "@" in host or ("@" in rest and re.search(r":(?!\d*$)", re.sub(r"^\[[^]]*\]", "", host)))
    signed = re.search(_SECRET_KEY, rest.partition("?")[2])
    if user or signed:
        raise UserError(
            "the address holds credentials",
            where=where,
            expected="an address that is no secret: it is written into the run's record",
            found=f"{scheme}:// address with {'a user before @' if user else 'a signature or key after ?'}",
            fix=f"take them out; credentials come from {_VARIABLES[scheme]}",
        )
