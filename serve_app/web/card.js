const MOST_CLASSES = 50;
const MOST_NAMED = 12;

const date = iso => new Intl.DateTimeFormat("en", {dateStyle: "long", timeZone: "UTC"}).format(new Date(iso));
const rowsOf = count => `${counted.format(count)} ${count === 1 ? "row" : "rows"}`;

function sentence({task, target, classes, inputs, metrics, data}) {
  const kinds = classes.length > 6 ? `one of ${counted.format(classes.length)} classes` : classes.join(classes.length > 2 ? ", " : " or ");
  const what = task === "classification" ? `Predicts ${target.name} (${kinds})` : `Predicts ${target.name}, a number,`;
  const from = `${what} from ${counted.format(inputs.length)} ${inputs.length === 1 ? "input" : "inputs"}.`;
  const tested = data?.account.test ? `On ${counted.format(data.account.test)} test rows` : "On the test rows";
  if (typeof metrics.accuracy === "number") return `${from} ${tested} it was right ${(metrics.accuracy * 100).toFixed(1)}% of the time.`;
  if (typeof metrics.mae === "number") return `${from} ${tested} it was off by ${grouped.format(metrics.mae)} on average.`;
  return from;
}

function facts(card) {
  const {data, provenance, model} = card;
  const listed = [];
  if (data?.num_files) {
    const more = data.num_files - data.files.length;
    listed.push(["data", data.files.join(", ") + (more ? ` and ${counted.format(more)} more files` : "")]);
  }
  if (data?.account.read) {
    const {read, kept, train, validation, test} = data.account;
    listed.push(["rows", `${counted.format(read)} read, ${counted.format(kept)} kept: ${counted.format(train)} training, ${counted.format(validation)} validation, ${counted.format(test)} test`]);
  }
  listed.push(["trained", date(provenance.created_at)], ["version", model.version], ["run", provenance.run], ["seed", provenance.seed]);
  if (provenance.commit) listed.push(["commit", provenance.commit]);
  const made = Object.entries(provenance.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  return [...listed, ["made with", made], ["served by", `raylway ${card.raylway}`]];
}

function seen({type, known, num_known: count, minimum, maximum}) {
  if (type === "category") {
    if (!count) return "text";
    const named = known.slice(0, MOST_NAMED).join(", ");
    return count > MOST_NAMED ? `${named} and ${counted.format(count - MOST_NAMED)} more` : named;
  }
  if (minimum === undefined) return "";
  return type === "date" ? `${day(minimum)} to ${day(maximum)}` : `${plain.format(minimum)} to ${plain.format(maximum)}`;
}

function showClasses({classes, data}) {
  const counts = data?.classes ?? [];
  at("classes").hidden = !classes.length;
  const most = Math.max(1, ...counts);
  const listed = classes.map((name, index) => [name, counts[index]]);
  if (counts.length) listed.sort((a, b) => b[1] - a[1]);
  at("class-head").replaceChildren(cells("th", counts.length ? ["class", make("th", {scope: "col", class: "number", text: "training rows"}), make("td")] : ["class"]));
  at("class-rows").replaceChildren(...listed.slice(0, MOST_CLASSES).map(([name, count]) => {
    const fill = make("i");
    fill.style.setProperty("--w", count / most);
    const track = make("td", {class: "fill", "aria-hidden": "true"}, make("span", {class: "track"}, fill));
    const known = counts.length ? [make("td", {class: "number", text: counted.format(count)}), track] : [];
    return cells("td", [make("th", {scope: "row", text: name}), ...known]);
  }));
  at("classes-note").textContent = classes.length > MOST_CLASSES ? `${MOST_CLASSES} of ${counted.format(classes.length)} classes.` : "";
}

function showCard(card) {
  const {model, target, task, provenance, metrics, inputs} = card;
  document.title = `${model.name} · Raylway`;
  at("name").textContent = model.name;
  at("kicker").replaceChildren(`${task[0].toUpperCase()}${task.slice(1)} of `, make("code", {text: target.name}), ` · version ${model.version} · ${date(provenance.created_at)}`);
  at("lead").textContent = sentence(card);
  at("answer-title").textContent = `Answer: ${target.name}`;
  const known = Object.entries(metrics).filter(([, value]) => typeof value === "number");
  at("metrics").replaceChildren(...known.map(([name, value]) =>
    make("div", {}, make("dt", {text: `${LABELS[name] ?? name}, test`}), make("dd", {text: value.toPrecision(4)}))));
  at("metrics").hidden = !known.length;
  at("facts").replaceChildren(...facts(card).flatMap(([name, value]) => [make("dt", {text: name}), make("dd", {text: value})]));
  showClasses(card);
  at("inputs").replaceChildren(...inputs.map(each =>
    cells("td", [make("th", {scope: "row", text: each.name}), each.type, each.required ? "yes" : "no", make("td", {class: "wide", text: seen(each)})])));
}
