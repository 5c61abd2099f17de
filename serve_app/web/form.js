const plain = new Intl.NumberFormat("en", {maximumSignificantDigits: 6, useGrouping: false});
const grouped = new Intl.NumberFormat("en", {maximumSignificantDigits: 6});
const counted = new Intl.NumberFormat("en");
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const MOST_CHOICES = 100;  // of more categories the list narrows down as one types
const MOST_SHOWN = 24;
const OTHER = "another value …";

const day = seconds => new Date(seconds * 1000).toISOString().slice(0, 10);
// A date as the browser's own fields have it, and back; both are UTC.
const asField = (text, hasHours) => {
  const bare = text.replace(/Z$/, "");
  return hasHours ? (bare.length === 10 ? `${bare}T00:00` : bare) : bare.slice(0, 10);
};

// What a category's text is in JSON: a number or a boolean where the column held these.
function asCategory(text, values) {
  if (values === "boolean" && /^(true|false)$/i.test(text)) return text.toLowerCase() === "true";
  const number = Number(text);
  return values === "number" && text !== "" && String(number) === text && Number.isFinite(number) ? number : text;
}

// One input of the model: its label, its control, what is known of it, and what is wrong with it.
class Field {
  constructor(input, index, changed) {
    this.input = input;
    const id = `f${index}`;
    this.error = make("span", {class: "error", id: `${id}-error`});
    this.hint = make("span", {class: "hint", id: `${id}-hint`, text: this.known()});
    this.control = this.made(id);
    this.control.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    const label = make("label", {for: id, text: input.name}, ...(input.required ? [] : [" ", make("small", {text: "optional"})]));
    this.element = make("div", {class: "field"}, label, this.control, this.hint, this.error);
    if (this.control.tagName === "SELECT") {
      this.other = make("input", {"aria-label": `another value of ${input.name}`, autocomplete: "off", hidden: ""});
      this.control.after(this.other);
    }
    this.element.addEventListener("input", () => {
      this.look();
      this.complain("");
      changed();
    });
  }

  made(id) {
    const {type, known = [], has_hours: hasHours} = this.input;
    if (type === "date")
      return make("input", {id, ...(hasHours ? {type: "datetime-local", step: "any"} : {type: "date"})});
    if (type === "number") return make("input", {id, inputmode: "decimal", autocomplete: "off", spellcheck: "false"});
    if (known.length && known.length <= MOST_CHOICES) {
      const empty = make("option", {value: "", text: this.input.required ? "choose …" : "empty"});
      const choices = known.map((name, index) => make("option", {value: String(index), text: name}));
      return make("select", {id}, empty, ...choices, make("option", {value: "other", text: OTHER}));
    }
    const list = make("datalist", {id: `${id}-list`}, ...known.map(name => make("option", {value: name})));
    document.body.append(list);
    return make("input", {id, list: list.id, autocomplete: "off", spellcheck: "false"});
  }

  known() {
    const {type, minimum, maximum, num_known: count = 0, has_hours: hasHours} = this.input;
    if (type === "category") return count > MOST_CHOICES ? `${counted.format(count)} known, such as those of the list` : "";
    if (minimum === undefined) return "";
    const [low, high] = type === "date" ? [day(minimum), day(maximum)] : [plain.format(minimum), plain.format(maximum)];
    return `${low} to ${high}${hasHours ? ", UTC" : ""}`;
  }

  set(value) {
    if (this.input.type === "date") this.control.value = value === undefined ? "" : asField(value, this.input.has_hours);
    else if (this.other) {
      const place = value === undefined ? -1 : this.input.known.indexOf(String(value));
      this.control.value = value === undefined ? "" : place < 0 ? "other" : String(place);
      this.other.value = place < 0 && value !== undefined ? String(value) : "";
    } else this.control.value = value === undefined ? "" : String(value);
    this.look();
    this.complain("");
  }

  get text() {
    if (!this.other) return this.control.value;
    const place = this.control.value;
    return place === "other" ? this.other.value : place === "" ? "" : this.input.known[Number(place)];
  }

  // {value}, {} for one left empty, or {error}.
  read() {
    const {type, required, values} = this.input;
    const text = type === "category" ? this.text : this.text.trim();
    if (type === "date" && this.control.validity.badInput) return {error: "expected a whole date"};
    if (text === "") return required ? {error: "expected a value"} : {};
    if (type === "category") return {value: asCategory(text, values)};
    if (type === "date") return {value: this.input.has_hours ? `${text}Z` : text};
    if (!NUMBER.test(text)) return {error: "expected a number, such as 12.5"};
    return Number.isFinite(Number(text)) ? {value: Number(text)} : {error: "is not a finite number"};
  }

  // Show what is unusual about the value; the model answers all the same.
  look() {
    if (this.other) this.other.hidden = this.control.value !== "other";
    const {type, minimum, maximum} = this.input;
    const {value} = this.read();
    const outside = type === "number" && minimum !== undefined && value !== undefined && (value < minimum || value > maximum);
    this.hint.classList.toggle("outside", outside);
    this.hint.textContent = outside ? `outside the ${this.known()} of training` : this.known();
  }

  complain(text) {
    this.error.textContent = text;
    for (const control of [this.control, this.other]) {
      if (text) control?.setAttribute("aria-invalid", "true");
      else control?.removeAttribute("aria-invalid");
    }
  }

  focus() {
    (this.other && !this.other.hidden ? this.other : this.control).focus();
  }
}

class Form {
  constructor(card) {
    this.card = card;
    this.place = -1;
    this.fields = card.inputs.map((input, index) => new Field(input, index, () => this.showRequest()));
    for (const [index, field] of this.fields.entries()) at(index < MOST_SHOWN ? "fields" : "more-fields").append(field.element);
    at("more").hidden = this.fields.length <= MOST_SHOWN;
    at("more-count").textContent = `${counted.format(this.fields.length - MOST_SHOWN)} further inputs`;
    at("another").hidden = card.examples.length < 2;
    at("another").onclick = () => this.another();
    at("form").onsubmit = event => {
      event.preventDefault();
      this.send();
    };
    this.another();
  }

  another() {
    const {examples} = this.card;
    if (examples.length) this.place = (this.place + 1) % examples.length;
    for (const field of this.fields) field.set(examples[this.place]?.[field.input.name]);
    at("which").textContent = examples.length > 1 ? `Example ${this.place + 1} of ${examples.length}` : "";
    this.showRequest();
  }

  // The row of the form; with `complain` mistakes are shown, and without them nothing comes back.
  row(complain) {
    const row = Object.create(null);  // an input may be called __proto__
    let first;
    for (const field of this.fields) {
      const {value, error} = field.read();
      if (error && complain) field.complain(error);
      if (error) first ??= field;
      if (value !== undefined) row[field.input.name] = value;
    }
    if (first && complain) this.point(first);
    return first ? undefined : row;
  }

  point(field) {
    if (at("more").contains(field.element)) at("more").open = true;
    field.focus();
  }

  showRequest() {
    const row = this.row(false);
    at("stale").hidden = Boolean(row);
    if (!row) return;
    at("curl").textContent = asCurl(`{"rows": [${JSON.stringify(row, null, 2).replaceAll("\n", "\n  ")}]}`);
    at("python").textContent = asPython(row);
  }

  async send() {
    const row = this.row(true);
    if (!row) return showProblem("Mend the marked inputs first.");
    if (at("form").ariaBusy === "true") return;
    at("form").ariaBusy = "true";
    const began = performance.now();
    try {
      const answer = await post(JSON.stringify({rows: [row]}));
      const content = await answer.json();
      const elapsed = performance.now() - began;
      if (answer.ok) return showAnswer(this.card, content, elapsed);
      this.refused(content);
    } catch (error) {
      showProblem(`No answer: ${error.message}`);
    } finally {
      at("form").ariaBusy = "false";
    }
  }

  refused(problem) {
    showProblem(problem.detail);
    const marked = (problem.errors ?? []).map(({feature, reason}) => {
      const field = this.fields.find(each => each.input.name === feature);
      field?.complain(reason);
      return field;
    });
    const first = marked.find(Boolean);
    if (first) this.point(first);
  }
}
