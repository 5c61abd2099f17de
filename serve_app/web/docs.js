async function start() {
  at("page").href = base;
  const [signature, api] = await unlocked(["signature", "openapi.json"]);
  const kinds = signature.classes.length ? ` as one of ${signature.classes.join(", ")}` : "";
  at("name").textContent = signature.model.name;
  document.title = `${signature.model.name}: interface`;
  at("lead").textContent = `Predicts ${signature.target}${kinds}. Version ${signature.model.version}.`;
  at("main").hidden = false;
  const example = api.paths["/predict"].post.requestBody.content["application/json"].examples.rows.value;
  at("body").value = JSON.stringify(example, null, 2);
  at("curl").textContent = asCurl(JSON.stringify(example));
  const notes = api.components.schemas.Row.properties;
  for (const each of signature.inputs)
    at("features").append(cells("td", [each.name, each.type, each.required ? "yes" : "no", notes[each.name].description ?? ""]));
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, operation] of Object.entries(methods))
      at("paths").append(cells("td", [`${method.toUpperCase()} ${path}`, operation.summary]));
}

at("send").onclick = async () => {
  at("answer").hidden = false;
  at("answer").textContent = "…";
  try {
    const answer = await post(at("body").value);
    at("answer").textContent = `${answer.status}\n${JSON.stringify(await answer.json(), null, 2)}`;
  } catch (error) { at("answer").textContent = `no answer: ${error.message}`; }
};

start().catch(error => { at("lead").textContent = `The signature can't be read: ${error.message}`; });
