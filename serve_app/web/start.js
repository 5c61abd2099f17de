async function start() {
  for (const link of document.querySelectorAll("[data-link]")) link.href = base + link.dataset.link;
  const [card] = await unlocked(["card"]);
  showCard(card);
  at("main").hidden = at("sections").hidden = false;
  new Form(card);
  new Upload(card);
}

start().catch(error => { at("lead").textContent = `The model card can't be read: ${error.message}`; });
