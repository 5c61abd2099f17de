const MOST_ROWS = 500;
const MOST_BYTES = 1 << 20;  // of a request; the server takes more, but an answer should come soon
const MOST_FILE_BYTES = 200 << 20;
const MOST_LISTED = 100;
const MOST_TRIES = 60;

class Unusable extends Error {}

// The records of CSV (RFC 4180) with the line on which each starts and where it ends; line ends may be CRLF, LF or CR.
function* records(text, delimiter) {
  const stop = new RegExp(`[${delimiter}\r\n]|$`, "g");
  for (let place = 0, line = 1; place < text.length;) {
    const record = {line, cells: []};
    do {
      if (record.cells.length) place += 1;  // the delimiter
      let cell = "";
      if (text[place] === '"') {
        for (let from = place + 1; ; from = place + 2) {
          place = text.indexOf('"', from);
          if (place < 0) throw new Unusable(`The quote that opens in the record of line ${record.line} never closes.`);
          cell += text.slice(from, place);
          if (text[place + 1] !== '"') break;
          cell += '"';
        }
        line += cell.split("\n").length - 1;
        place += 1;
      }
      stop.lastIndex = place;
      const end = stop.exec(text).index;
      record.cells.push(cell + text.slice(place, end));
      place = end;
    } while (text[place] === delimiter);
    place += text.startsWith("\r\n", place) ? 2 : 1;
    line += 1;
    record.end = place;
    if (record.cells.length > 1 || record.cells[0] !== "") yield record;
  }
}

function delimiterOf(text) {
  const head = text.slice(0, 100_000).replace(/"[^"]*"/g, "").split(/[\r\n]/, 1)[0];
  const count = each => head.split(each).length;
  return [",", ";", "\t"].reduce((best, each) => count(each) > count(best) ? each : best);
}

async function textOf(file) {
  if (file.size > MOST_FILE_BYTES)
    throw new Unusable(`The file has ${counted.format(file.size >> 20)} MiB; the page takes up to ${MOST_FILE_BYTES >> 20}. raylway predict answers files of any size.`);
  try {
    return new TextDecoder("utf-8", {fatal: true}).decode(await file.arrayBuffer());
  } catch {
    throw new Unusable("The file is not text in UTF-8; save it as “CSV UTF-8”.");
  }
}

// How the columns of a file become the inputs of the model.
class Columns {
  constructor(card, names) {
    this.names = names.map(name => name.trim());
    const twice = this.names.find((name, index) => this.names.indexOf(name) !== index);
    if (twice !== undefined) throw new Unusable(`The column ${twice} stands in the header twice.`);
    this.inputs = card.inputs.map(input => ({...input, at: this.names.indexOf(input.name)}));
    const lacking = this.inputs.filter(({at: place, required}) => place < 0 && required).map(({name}) => name);
    if (lacking.length)
      throw new Unusable(`The header lacks ${lacking.slice(0, 10).join(", ")}${lacking.length > 10 ? ` and ${lacking.length - 10} more` : ""}. It has ${this.names.slice(0, 20).join(", ")}.`);
    this.missing = new Set(["", ...card.missing]);
    const used = new Set(card.inputs.map(({name}) => name));
    this.unused = this.names.filter(name => !used.has(name));
  }

  // The row as JSON, or what is wrong with it.
  row(texts) {
    if (texts.length !== this.names.length)
      return {problem: `has ${texts.length} cells, the header ${this.names.length}`};
    const row = Object.create(null);
    for (const {name, type, required, at: place} of this.inputs) {
      const text = place < 0 ? "" : texts[place];
      const {value, problem} = type === "number" ? this.number(text) : text.trim() === "" ? {} : {value: text};
      if (problem) return {problem: `${name} ${problem}`};
      if (value !== undefined) row[name] = value;
      else if (required) return {problem: `${name} is empty`};
    }
    return {json: JSON.stringify(row)};
  }

  number(cell) {
    const text = cell.trim();
    if (this.missing.has(text)) return {};
    if (/^[+-]?inf(inity)?$/i.test(text) || (NUMBER.test(text) && !Number.isFinite(Number(text))))
      return {problem: "is not a finite number"};
    return NUMBER.test(text) ? {value: Number(text)} : {problem: `expected a number; found ‘${text.slice(0, 40)}’`};
  }
}

// The rows of a file on their way to the server and back.
class Batch {
  constructor(card, file, text) {
    Object.assign(this, {card, file, text, rows: [], stopped: "", control: new AbortController()});
    this.delimiter = delimiterOf(text);
    this.records = records(text, this.delimiter);
    const head = this.records.next();
    if (head.done) throw new Unusable("The file is empty.");
    this.columns = new Columns(card, head.value.cells);
  }

  async run(progress) {
    const most = Math.min(MOST_BYTES, this.card.max_body_bytes) - 100;
    let [waiting, bytes] = [[], 0];
    try {
      for (const {line, cells: texts, end} of this.records) {
        const row = {line, texts, ...this.columns.row(texts)};
        this.rows.push(row);
        if (row.problem) continue;
        const size = new TextEncoder().encode(row.json).length + 1;
        if (waiting.length === MOST_ROWS || (waiting.length && bytes + size > most)) {
          await this.answer(waiting);
          progress(end / this.text.length);
          [waiting, bytes] = [[], 0];
        }
        waiting.push(row);
        bytes += size;
      }
      await this.answer(waiting);
    } catch (error) {
      this.stopped = error.name === "AbortError" ? "Stopped." : `Stopped: ${error.message}`;
    }
    for (const row of this.rows) if (!row.problem && row.label === undefined) row.problem = "was not asked";
  }

  // Rows that the server refuses are named by it and left out; of rows that fail the model each half is asked by itself.
  async answer(rows) {
    if (!rows.length) return;
    const answer = await this.patiently(`{"rows": [${rows.map(({json}) => json).join(",")}]}`);
    const content = await answer.json();
    if (answer.ok) {
      for (const [index, row] of rows.entries())
        Object.assign(row, {label: content.predictions[index], probabilities: content.probabilities?.[index]});
      return;
    }
    const refused = new Set();
    for (const {row: index, feature, reason} of content.errors ?? [])
      if (index !== null && !refused.has(index)) {
        refused.add(index);
        rows[index].problem = [feature, reason].filter(Boolean).join(" ");
      }
    if (refused.size) return this.answer(rows.filter((_, index) => !refused.has(index)));
    if (![413, 500].includes(answer.status)) throw new Error(content.detail);
    if (rows.length === 1) rows[0].problem = content.detail;
    else for (const half of [rows.slice(0, rows.length >> 1), rows.slice(rows.length >> 1)]) await this.answer(half);
  }

  async patiently(body) {
    for (let tries = 1; ; tries += 1) {
      const {signal} = this.control;
      const answer = await ask("predict", {method: "POST", headers: {"Content-Type": "application/json"}, body, signal});
      if (![429, 503].includes(answer.status) || tries === MOST_TRIES) return answer;
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((resolve, reject) => {
        const timer = setTimeout(resolve, seconds * 1000);
        signal.addEventListener("abort", () => {
          clearTimeout(timer);
          reject(signal.reason);
        }, {once: true});
      });
    }
  }

  // The file as it came, with the answers in further columns.
  get csv() {
    const {names} = this.columns;
    const free = name => names.includes(name) ? free(`${name}_`) : name;
    const more = ["prediction", ...this.card.classes.map(name => `p_${name}`), "problem"].map(free);
    const answers = ({label = "", probabilities = Object.create(null), problem = ""}) =>
      [label, ...this.card.classes.map(name => probabilities[name] ?? ""), problem];
    const lines = [[...names, ...more], ...this.rows.map(row => [...names.map((_, index) => row.texts[index] ?? ""), ...answers(row)])];
    return asCsv(lines, this.delimiter);
  }
}

const asCsv = (lines, delimiter) => lines.map(line => `${line.map(value => {
  const text = String(value);
  return /["\r\n]|^\s|\s$/.test(text) || text.includes(delimiter) ? `"${text.replaceAll('"', '""')}"` : text;
}).join(delimiter)}\r\n`).join("");

function download(text, name) {
  const url = URL.createObjectURL(new Blob([text], {type: "text/csv;charset=utf-8"}));
  make("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

class Upload {
  constructor(card) {
    this.card = card;
    at("file").onchange = () => this.take(at("file").files[0]);
    const zone = at("drop");
    zone.ondragover = event => event.preventDefault();
    zone.ondragenter = zone.ondragleave = ({type}) => zone.classList.toggle("over", type === "dragenter");
    zone.ondrop = event => {
      event.preventDefault();
      zone.classList.remove("over");
      this.take(event.dataTransfer.files[0]);
    };
    at("template").onclick = () => {
      const names = card.inputs.map(({name}) => name);
      const examples = card.examples.map(row => names.map(name => row[name] ?? ""));
      download(asCsv([names, ...examples], ","), `${card.model.name}-example.csv`);
    };
    at("stop").onclick = () => this.batch?.control.abort();
    at("download").onclick = () => download(this.batch.csv, this.batch.file.name.replace(/\.csv$/i, "") + "-answered.csv");
  }

  async take(file) {
    if (!file || at("many").ariaBusy === "true") return;
    at("many").ariaBusy = "true";
    at("results").hidden = true;
    at("csv-status").textContent = `Reading ${file.name} …`;
    try {
      this.batch = new Batch(this.card, file, await textOf(file));
      at("progress").value = 0;
      at("progress").hidden = at("stop").hidden = false;
      await this.batch.run(part => { at("progress").value = part; });
      this.show(this.batch);
    } catch (error) {
      if (!(error instanceof Unusable)) throw error;
      at("csv-status").textContent = error.message;
    } finally {
      at("progress").hidden = at("stop").hidden = true;
      at("file").value = "";  // the same file may be chosen again
      at("many").ariaBusy = "false";
    }
  }

  show({rows, columns, stopped, file}) {
    const bad = rows.filter(({problem}) => problem);
    const answered = `${file.name}: ${counted.format(rows.length - bad.length)} of ${counted.format(rows.length)} rows answered`;
    const said = [answered + (bad.length ? `, ${counted.format(bad.length)} with a problem.` : "."), stopped];
    if (columns.unused.length) said.push(`Not asked for: ${columns.unused.slice(0, 10).join(", ")}.`);
    at("csv-status").textContent = said.filter(Boolean).join(" ");
    at("results").hidden = !rows.length;
    const shown = columns.names.slice(0, 4);
    const {classes, target} = this.card;
    at("answers").tHead.replaceChildren(cells("th", ["line", target.name, ...(classes.length ? ["probability"] : []), ...shown]));
    at("answers").tBodies[0].replaceChildren(...rows.slice(0, MOST_LISTED).map(({line, texts, label, probabilities, problem}) => {
      const answer = problem ? make("td", {class: "error", text: "problem"}) : classes.length ? label : plain.format(label);
      const sure = classes.length ? [problem ? "" : share(probabilities[label])] : [];
      return cells("td", [make("th", {scope: "row", text: line}), answer, ...sure, ...shown.map((_, index) => texts[index] ?? "")]);
    }));
    at("answers-note").textContent = rows.length > MOST_LISTED ? `The first ${MOST_LISTED} rows; the download has all.` : "";
    at("problems").hidden = !bad.length;
    at("problem-rows").replaceChildren(...bad.slice(0, MOST_LISTED).map(({line, problem}) =>
      cells("td", [make("th", {scope: "row", text: line}), problem])));
    at("problems-note").textContent = bad.length > MOST_LISTED ? `The first ${MOST_LISTED}; the download has all.` : "";
  }
}
