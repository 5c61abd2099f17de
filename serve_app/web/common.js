"use strict";
// Names and values of the model and of files reach the page as text nodes and attributes' values, never as HTML.
const at = id => document.getElementById(id);
// The model may be served below any path: everything is asked beside this page.
const [path, own] = [location.pathname.replace(/\/$/, ""), document.body.dataset.path];
const base = `${path.endsWith(own) ? path.slice(0, path.length - own.length) : path}/`;
const address = location.origin + base;

function make(tag, {text, ...attributes} = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A row of a table; values are texts or cells.
function cells(tag, values) {
  const scope = tag === "th" ? {scope: "col"} : {};
  return make("tr", {}, ...values.map(value => value instanceof Node ? value : make(tag, {text: value, ...scope})));
}

// The API key lives as long as the tab.
let key = sessionStorage.getItem("raylway-key") || "";

function ask(path, options = {}) {
  return fetch(base + path, {...options, headers: {...options.headers, ...(key && {Authorization: `Bearer ${key}`})}});
}

const post = body => ask("predict", {method: "POST", headers: {"Content-Type": "application/json"}, body});

// Asks for paths that need a key until there is a good one, and then goes on.
async function unlocked(paths) {
  for (;;) {
    const answers = await Promise.all(paths.map(path => ask(path)));
    const bad = answers.find(answer => !answer.ok);
    if (!bad) {
      at("unlock").hidden = true;
      at("forget").hidden = !key;
      return Promise.all(answers.map(answer => answer.json()));
    }
    const problem = await bad.json().catch(() => ({detail: `status ${bad.status}`}));
    if (bad.status !== 401) throw new Error(problem.detail);
    at("unlock-note").textContent = key ? "This key is not known here." : "";
    await typed();
  }
}

function typed() {
  at("lead").textContent = "This model answers those who have an API key.";
  at("unlock").hidden = false;
  at("key").focus();
  return new Promise(resolve => {
    at("unlock").onsubmit = event => {
      event.preventDefault();
      key = at("key").value.trim();
      if (!/^[\x21-\x7e]*$/.test(key)) {
        at("unlock-note").textContent = "A key has no blanks and none but ASCII characters.";
        return;
      }
      sessionStorage.setItem("raylway-key", key);
      resolve();
    };
  });
}

at("forget").onclick = () => {
  sessionStorage.removeItem("raylway-key");
  location.reload();
};

const quoted = text => /^[\w:/.~%@-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

function asCurl(json) {
  const lines = [`curl ${quoted(address + "predict")}`, "-H 'Content-Type: application/json'"];
  if (key) lines.push('-H "Authorization: Bearer $API_KEY"');
  return [...lines, `-d ${quoted(json)}`].join(" \\\n  ");
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // browsers have no clipboard for pages without TLS, but on this machine
    const area = make("textarea", {readonly: ""});
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

for (const button of document.querySelectorAll("[data-copies]"))
  button.onclick = async () => {
    await copied(at(button.dataset.copies).textContent);
    button.focus();
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
