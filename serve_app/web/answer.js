const MOST_BARS = 10;
const LABELS = {
  accuracy: "accuracy", f1_weighted: "F1 (weighted)", f1_macro: "F1 (macro)", roc_auc: "ROC-AUC", log_loss: "log loss",
  rmse: "RMSE", mae: "MAE", r2: "R²",
};

function share(value) {
  if (value > 0 && value < 0.001) return "below 0.1%";
  return value < 1 && value > 0.999 ? "above 99.9%" : `${(value * 100).toFixed(1)}%`;
}

function asPython(row) {
  const literal = value => value === true ? "True" : value === false ? "False" : JSON.stringify(value);
  const headers = '"Content-Type": "application/json"' + (key ? ', "Authorization": "Bearer " + os.environ["API_KEY"]' : "");
  return [
    "import json", ...(key ? ["import os"] : []), "import urllib.request", "", "row = {",
    ...Object.entries(row).map(([name, value]) => `    ${JSON.stringify(name)}: ${literal(value)},`), "}",
    "request = urllib.request.Request(", `    ${JSON.stringify(address + "predict")},`,
    '    json.dumps({"rows": [row]}).encode(),', `    {${headers}},`, ")",
    "with urllib.request.urlopen(request) as answer:", "    print(json.load(answer))",
  ].join("\n");
}

function showProblem(text) {
  at("verdict").replaceChildren(make("span", {class: "verdict bad", text}));
  at("detail").replaceChildren();
  at("whole").hidden = true;
}

function showAnswer(card, content, elapsed) {
  const label = content.predictions[0];
  const shown = card.classes.length ? label : grouped.format(label);
  const took = `Answered in ${elapsed < 10 ? elapsed.toFixed(1) : Math.round(elapsed)} ms`;
  at("verdict").replaceChildren(make("span", {class: "verdict", text: shown}), make("span", {class: "note", text: took}));
  at("detail").replaceChildren(card.classes.length ? bars(content.probabilities[0]) : place(card.target, label));
  at("whole").hidden = false;
  at("json").textContent = JSON.stringify(content, null, 2);
  at("verdict").scrollIntoView({block: "nearest"});
}

// Probabilities, the largest first.
function bars(probabilities) {
  const sorted = Object.entries(probabilities).sort((a, b) => b[1] - a[1]);
  const listed = part => make("ol", {class: "bars"}, ...part.map(([name, value]) => {
    const fill = make("i");
    fill.style.setProperty("--w", value);
    return make("li", value === sorted[0][1] ? {class: "first"} : {}, make("span", {class: "name", text: name}),
      make("span", {class: "share", text: share(value), title: String(value)}),
      make("span", {class: "track", "aria-hidden": "true"}, fill));
  }));
  const rest = sorted.slice(MOST_BARS);
  const whole = make("div", {}, listed(sorted.slice(0, MOST_BARS)));
  if (rest.length) {
    const summary = make("summary", {text: `${counted.format(rest.length)} further classes`});
    whole.append(make("details", {}, summary, listed(rest)));
  }
  return whole;
}

// Share of the training rows below a value, from the counts between the quantiles.
function below(target, value) {
  const ends = [target.minimum, ...target.edges, target.maximum];
  let rows = 0;
  for (const [index, count] of target.counts.entries()) {
    const width = ends[index + 1] - ends[index];
    rows += count * Math.min(1, Math.max(0, width > 0 ? (value - ends[index]) / width : Number(value > ends[index])));
  }
  return rows / target.counts.reduce((sum, count) => sum + count, 0);
}

// Where a value lies in the training range of the target.
function place(target, value) {
  const {minimum, maximum, edges} = target;
  if (minimum === undefined) return make("div");
  const span = maximum - minimum || 1;
  const across = each => Math.min(1, Math.max(0, (each - minimum) / span));
  const [box, mark] = [make("i"), make("b")];
  box.style.setProperty("--a", across(edges[0] ?? minimum));
  box.style.setProperty("--b", across(edges.at(-1) ?? maximum));
  mark.style.setProperty("--w", across(value));
  const inside = value >= minimum && value <= maximum;
  const words = inside ? `Above ${share(below(target, value))} of the training rows; the band holds nine in ten of them.`
    : `${value < minimum ? "Below" : "Above"} every training row: the model has seen nothing like it.`;
  return make("div", {},
    make("div", {class: "place", "aria-hidden": "true"}, box, mark),
    make("div", {class: "ends note"}, make("span", {text: `lowest ${grouped.format(minimum)}`}), make("span", {text: `highest ${grouped.format(maximum)}`})),
    make("p", {class: "note", text: words}));
}
