// What a person makes of the graph: pins, names, notes and groups, and their file.
import { cut, h } from "./dom.js";
import { groupsDocument, readGroups, saveGroups } from "./files.js";

export function pin(app, node) {
  const name = app.main.graph.names[node];
  app.store.edit((doc) => {
    doc.pinned = doc.pinned.includes(name) ? doc.pinned.filter((one) => one !== name) : [...doc.pinned, name];
  });
}

export function rename(app, node, text) {
  const name = app.main.graph.names[node];
  app.store.edit((doc) => {
    if (text.trim()) doc.names[name] = text.trim();
    else delete doc.names[name];
  });
}

export function annotate(app, node, text) {
  const name = app.main.graph.names[node];
  app.store.edit((doc) => {
    if (text.trim()) doc.notes[name] = text;
    else delete doc.notes[name];
  });
}

/** Puts a node into a group that is chosen by name, an existing one or a new one. */
export function addToGroup(app, node) {
  const { groups } = app.store.doc;
  const list = h("datalist", { id: "group-names" }, groups.map(({ name }) => h("option", { value: name })));
  const box = h("input", { type: "text", list: "group-names", placeholder: "Name of the group", "aria-label": "Name of the group", maxlength: "200", dir: "auto" });
  const dialog = h("dialog", { class: "ask" }, h("form", { method: "dialog", onsubmit: () => group(app, node, box.value) },
    h("h2", {}, node === null ? "New group" : ["Put ", cut(app.title(node), 40), " into a group"]), box, list,
    h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), h("button", { class: "primary" }, "OK"))));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

export function group(app, node, title) {
  const name = title.trim();
  if (!name) return;
  const member = node === null ? null : app.main.graph.names[node];
  app.store.edit((doc) => {
    if (member) for (const group of doc.groups) group.members = group.members.filter((one) => one !== member);
    let group = doc.groups.find((one) => one.name === name);
    if (!group) doc.groups.push((group = { name, members: [] }));
    if (member) group.members.push(member);
    doc.groups = doc.groups.filter((one) => one.members.length || one === group);
  });
  app.panel.open("groups");
}

export function renameGroup(app, place, text) {
  const name = text.trim();
  const { groups } = app.store.doc;
  if (!name || groups.some((group, i) => group.name === name && i !== place)) {
    app.say(name ? "Another group has that name." : "A group needs a name.");
    return app.panel.showGroups();
  }
  app.store.edit((doc) => { doc.groups[place].name = name; });
}

export function removeGroup(app, place) {
  app.store.edit((doc) => { doc.groups.splice(place, 1); });
}

export async function save(app) {
  try {
    app.say(await saveGroups(app.extras.name ?? "graph", groupsDocument(app.graphs.a.identity, app.store.doc), app.extras.server));
  } catch (error) {
    app.say(`Not saved. ${error.message}`);
  }
}

export function loadGroups(app) {
  const chooser = h("input", { type: "file", accept: ".json", hidden: true, class: "groups-file" });
  chooser.addEventListener("change", async () => {
    try {
      const read = readGroups(await chooser.files[0].text(), app.graphs.a);
      app.store.edit((doc) => Object.assign(doc, read));
      app.say("Groups opened.");
    } catch (error) {
      app.say(error.message);
    }
    chooser.remove();
  });
  document.body.append(chooser);
  chooser.click();
}
