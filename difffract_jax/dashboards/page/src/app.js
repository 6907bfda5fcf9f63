// The page: one state, one or two drawings, the column beside them, and what joins them.
import { edgesOf } from "./data.js";
import { accountOf } from "./account.js";
import { coloursOf, prefersDark } from "./colours.js";
import { cut, download, fill, h, number, percent, short } from "./dom.js";
import { groupsDocument, pngOf, readGroups, saveGroups, svgOf } from "./files.js";
import { Panel } from "./panel.js";
import { strongestPath } from "./paths.js";
import { Picture, activeAt } from "./picture.js";
import { Scene } from "./scene.js";
import { Store } from "./store.js";
import { View } from "./view.js";

export class App {
  constructor(graphs, extras) {
    this.extras = extras;
    this.graphs = graphs;
    this.views = {};
    for (const [key, graph] of Object.entries(graphs)) this.views[key] = new View(graph);
    this.store = new Store(this.startingDoc(), { selected: null, unfolded: true, show: "a", path: false, camera: null, image: 0 });
    this.dark = prefersDark();
    this.readTheme();
    this.hovered = null;
    this.marked = null;
  }

  startingDoc() {
    const groups = Object.entries(this.graphs.a.supernodes).map(([name, members]) => ({ name, members }));
    const doc = { ...this.graphs.a.start, groups, names: {}, notes: {}, pinned: [] };
    if (!this.extras.groups) return doc;
    return { ...doc, ...readGroups(JSON.stringify(this.extras.groups), this.graphs.a.identity) };
  }

  /** Which of the graphs the tables are about: the only one, the first of two, or their difference. */
  get main() {
    return this.views[this.store.view.show === "side" ? "a" : this.store.view.show] ?? this.views.a;
  }

  get colours() {
    return coloursOf(this.dark);
  }

  build(root) {
    this.scenes = {
      left: new Scene("The circuit. Arrow keys walk along edges.", this.handlers("left")),
      right: new Scene("The second circuit", this.handlers("right")),
    };
    this.stage = h("div", { class: "stage" }, this.scenes.left.element, this.scenes.right.element);
    const pointing = {
      patch: (position) => this.mark(position, false),
      word: (position) => this.mark(position, true),
      image: (place) => this.store.look({ image: place }),
    };
    const pictureOf = (key) => new Picture(this.graphs[key], this.imagesOf(key), this.extras.image_note ?? "", pointing);
    this.pictures = { a: pictureOf("a"), ...(this.graphs.b ? { b: pictureOf("b") } : {}) };
    this.panel = new Panel(this);
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    this.toast = h("div", { class: "toast", role: "alert", hidden: true });
    root.append(h("div", { class: "page" }, this.header(),
      h("main", {}, h("div", { class: "drawing" }, h("div", { class: "above" }, this.legend(), this.foldButton(), this.zoomButtons()), this.stage, this.controls()),
        h("aside", {}, Object.values(this.pictures).map((picture) => picture.element), this.panel.element)),
      this.tip, this.toast, this.helpBox(), this.frameBox()));
    this.store.listen((what) => this.changed(what));
    this.loadImages();
    this.store.follow(location.hash.slice(1));
    window.addEventListener("hashchange", () => this.store.follow(location.hash.slice(1)));
    window.matchMedia?.("(prefers-color-scheme: dark)").addEventListener("change", (event) => this.setTheme(event.matches, false));
    this.applyTheme();
    this.refresh();
  }

  header() {
    const { a, b } = this.graphs;
    const button = (key, text, title, onclick) => h("button", { type: "button", "data-action": key, title, onclick }, text);
    this.searchBox = h("input", { type: "search", class: "search", placeholder: "Search  /", "aria-label": "Search nodes", maxlength: "200",
      oninput: () => this.search(), onkeydown: (event) => this.searchKey(event), onfocus: () => this.search() });
    this.results = h("ul", { class: "results", hidden: true });
    this.undoButton = button("undo", "↶", "Undo (u)", () => this.store.undo());
    this.redoButton = button("redo", "↷", "Redo (r)", () => this.store.redo());
    this.switch = b ? h("div", { class: "switch", role: "group", "aria-label": "Which graph" },
      [["a", "First"], ["b", "Second"], ["side", "Side by side"], ...(this.graphs.difference ? [["difference", "Difference"]] : [])].map(([key, name]) =>
        h("button", { type: "button", "data-show": key, title: this.graphs[key] ? short(this.graphs[key].title, 200) : name,
          onclick: () => this.store.look({ show: key, path: false }) }, name))) : null;
    return h("header", { class: "head" },
      h("div", { class: "titles" }, h("h1", {}, cut(a.title, 90)),
        h("p", { class: "prompt" }, a.prompt ? ["“", cut(a.prompt, 110), "”"] : `${a.count} nodes, ${a.edges} edges`)),
      this.switch,
      h("div", { class: "find" }, this.searchBox, this.results),
      h("div", { class: "tools" }, this.undoButton, this.redoButton,
        button("svg", "SVG", "Save the drawing as SVG", () => this.exportSvg()),
        button("png", "PNG", "Save the drawing as PNG", () => this.exportPng()),
        button("link", "Link", "Copy an address of this view (l)", () => this.copyLink()),
        button("theme", "◐", "Light or dark (d)", () => this.setTheme(!this.dark)),
        button("help", "?", "Keys (?)", () => this.help.showModal())));
  }

  legend() {
    const entry = (kind, name) => h("li", {}, h("span", { class: `mark ${kind}` }), name);
    return h("ul", { class: "legend", title: "Size of a node and width of an edge: how much the target hangs on it" },
      entry("feature img", "image feature"), entry("feature txt", "text feature"), entry("input img", "input"),
      entry("error img", "error"), entry("rest img", "not followed"), entry("output", "target"),
      h("li", {}, h("span", { class: "mark edge plus" }), (this.raises = h("span", {}))),
      h("li", {}, h("span", { class: "mark edge minus" }), (this.lowers = h("span", {}))));
  }

  zoomButtons() {
    const zoom = (key, text, title, act) => h("button", { type: "button", "data-action": key, title, "aria-label": title, onclick: act }, text);
    const by = (factor) => () => this.activeScenes().forEach((scene) => scene.zoomBy(factor));
    return h("div", { class: "zoom" }, zoom("zoom-in", "+", "Zoom in", by(1.5)), zoom("zoom-out", "−", "Zoom out", by(1 / 1.5)),
      zoom("fit", "⤢", "Show all (f)", () => this.fit()));
  }

  controls() {
    const slider = (key, name, why) => {
      const input = h("input", { type: "range", min: "0.02", max: "1", step: "0.01", "data-slider": key, title: why,
        oninput: () => this.slide(key, Number(input.value)), onchange: () => this.store.settle() });
      const figure = h("output", {});
      this.sliders[key] = { input, figure };
      return h("label", { class: "slider", title: why }, h("span", {}, name), input, figure);
    };
    this.sliders = {};
    this.mode = h("select", { "aria-label": "Pruning rule", title: "standard: all nodes in one list, as circuit-tracer; difffract: per stream, errors stay",
      onchange: () => this.store.edit((doc) => { doc.mode = this.mode.value; }) }, h("option", { value: "standard" }, "standard"), h("option", { value: "difffract" }, "per stream"));
    this.counted = h("span", { class: "counted" });
    return h("div", { class: "controls" },
      slider("node_threshold", "Nodes", "Share of the influence that the nodes you see hold"),
      slider("edge_threshold", "Edges", "Share of the edge scores that the edges you see hold"), this.mode, this.counted);
  }

  foldButton() {
    this.fold = h("button", { type: "button", class: "fold", "data-action": "fold", title: "Steps one above another, or in one place (s)",
      onclick: () => this.store.look({ unfolded: !this.store.view.unfolded }) });
    this.fold.hidden = !Object.values(this.graphs).some((graph) => graph.steps.length > 1);
    return this.fold;
  }

  helpBox() {
    const keys = [["↑ ↓", "along the strongest edge, towards the target or away from it"], ["← →", "to the next node of the row"], ["/", "search"], ["p", "pin"],
      ["g", "put into a group"], ["n", "name"], ["m", "note"], ["t", "path to the target"], ["o", "feature page"], ["u, r", "undo, redo"], ["s", "unfold or stack steps"], ["f", "show all"],
      ["d", "light or dark"], ["l", "copy an address of this view"], ["Esc", "let go"]];
    this.help = h("dialog", { class: "help" }, h("h2", {}, "Keys"), h("dl", {}, keys.map(([key, what]) => [h("dt", {}, key), h("dd", {}, what)])),
      h("form", { method: "dialog" }, h("button", {}, "Close")));
    return this.help;
  }

  frameBox() {
    this.pageFrame = h("iframe", { title: "Page of the feature", referrerpolicy: "no-referrer" });
    this.pageDialog = h("dialog", { class: "feature-page" }, h("form", { method: "dialog" }, h("button", {}, "Close")), this.pageFrame);
    return this.pageDialog;
  }

  /** Returns the images of a graph's run; a difference has those of the first. */
  imagesOf(key) {
    return (key === "b" ? this.extras.images_b : this.extras.images) ?? [];
  }

  /** The image and the words beside the drawing: those of the graph that the tables are about. */
  get picture() {
    return (this.store.view.show === "b" && this.pictures.b) || this.pictures.a;
  }

  loadImages() {
    const load = ({ address }) => {
      const image = new Image();
      image.onload = () => this.redraw();
      image.src = address;
      return image;
    };
    this.pixels = { a: this.imagesOf("a").map(load), b: this.imagesOf("b").map(load) };
  }

  /** Returns an image of a graph's run that is ready to be drawn; null if there is none. */
  pixelsOf(key, place) {
    const image = this.pixels?.[key === "b" ? "b" : "a"][place];
    return image?.complete ? image : null;
  }

  stepImage(key, step) {
    return this.pixelsOf(key, this.imagesOf(key).findIndex((image) => image.step === step));
  }

  // What changed, and what follows.

  changed(what) {
    if (what === "doc") this.refresh();
    else this.looked();
    clearTimeout(this.linking);
    this.linking = setTimeout(() => this.writeLink(), 250);
  }

  refresh() {
    for (const view of Object.values(this.views)) view.prune(this.store.doc);
    this.looked();
  }

  looked() {
    const { view } = this.store;
    const several = view.unfolded && Object.values(this.graphs).some((graph) => graph.steps.length > 1);
    const { frame } = this.scenes.left;
    const aspect = frame.width ? this.scenes.left.aspect(several) : 0.6;
    for (const one of Object.values(this.views)) one.layOut(view.unfolded, aspect);
    this.path = null;
    const node = this.selected();
    const { graph, shares, masks } = this.main;
    if (view.path && node !== null) {
      const paths = graph.targets.map((target) => strongestPath(graph, shares, masks.edges, node, target.node));
      this.path = paths.filter(Boolean).sort((a, b) => b.share - a.share)[0] ?? null;
    }
    this.stage.classList.toggle("two", view.show === "side");
    this.scenes.right.element.hidden = view.show !== "side";
    this.scenes.left.graphKey = view.show === "side" ? "a" : view.show;
    this.scenes.right.graphKey = "b";
    this.redraw();
    this.showControls();
    this.panel.show();
    if (view.camera && !this.steering) this.activeScenes().forEach((scene) => scene.frame.width && scene.place(view.camera));
    for (const picture of Object.values(this.pictures)) picture.element.hidden = picture !== this.picture;
    if (this.picture.chosen !== view.image) this.picture.choose(view.image < this.picture.images.length ? view.image : 0);
    this.refocus();
  }

  redraw() {
    for (const scene of this.activeScenes()) {
      const view = this.views[scene.graphKey];
      const key = scene.graphKey;
      scene.show(view.look({ colours: this.colours, doc: this.store.doc, title: (node) => this.title(node, view.graph),
        image: this.pixelsOf(key, this.store.view.image) ?? this.pixelsOf(key, 0), stepImage: (step) => this.stepImage(key, step) }));
    }
  }

  activeScenes() {
    return this.store.view.show === "side" ? [this.scenes.left, this.scenes.right] : [this.scenes.left];
  }

  showControls() {
    const { doc, past, future, view } = this.store;
    for (const [key, { input, figure }] of Object.entries(this.sliders)) {
      input.value = String(doc[key]);
      figure.textContent = percent(doc[key]);
    }
    this.mode.value = doc.mode;
    const { graph, counts } = this.main;
    this.counted.textContent = `${counts.nodes.toLocaleString("en")} of ${graph.count.toLocaleString("en")} nodes · ${counts.edges.toLocaleString("en")} of ${graph.edges.toLocaleString("en")} edges`;
    this.undoButton.disabled = !past.length;
    this.redoButton.disabled = !future.length;
    const between = view.show === "difference";
    this.raises.textContent = between ? "more in the first" : "raises";
    this.lowers.textContent = between ? "more in the second" : "lowers";
    this.fold.textContent = view.unfolded ? "Stack steps" : "Unfold steps";
    this.switch?.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.show === view.show)));
  }

  slide(key, value) {
    this.store.preview((doc) => { doc[key] = value; });
  }

  account() {
    const { graph, masks } = this.main;
    return accountOf(graph, masks.nodes, masks.edges);
  }

  // Nodes.

  /** Returns the selected node in the graph that the tables are about; null if there is none. */
  selected(graph = this.main.graph) {
    return graph.number.get(this.store.view.selected) ?? null;
  }

  /** Returns what to call a node: the name given by hand, its label, or its address. */
  title(node, graph = this.main.graph) {
    const given = this.store.doc.names[graph.names[node]];
    const label = graph.labels[node];
    const step = label && !this.store.view.unfolded && graph.steps.length > 1 ? ` #${graph.node_step[node]}` : "";
    return given || (label && label + step) || graph.names[node];
  }

  select(node) {
    const name = node === null ? null : this.main.graph.names[node];
    if (name !== this.store.view.selected) this.store.look({ selected: name, path: false });
    if (node !== null) this.panel.open("node");
  }

  handlers(side) {
    return {
      hover: (node, event, word = null) => {
        const graph = this.views[this.scenes[side].graphKey]?.graph;
        this.point(node === null || !graph ? null : node, event, graph);
        if (node === null && word !== null) this.mark(word, true);
        else if (this.fromAxis) this.mark(null, true);
        this.fromAxis = node === null && word !== null;
      },
      select: (node) => {
        const { graph } = this.views[this.scenes[side].graphKey];
        if (node !== null && graph !== this.main.graph) {
          this.store.look({ selected: graph.names[node], path: false });
          return this.panel.open("node");
        }
        this.select(node);
      },
      resized: () => {
        if (side === "left" && this.views.a.masks) this.looked();
      },
      camera: (camera, byHand) => {
        this.steering = true;
        this.store.view.camera = camera;
        if (camera) for (const scene of this.activeScenes()) if (scene !== this.scenes[side]) scene.place(camera);
        clearTimeout(this.linking);
        this.linking = setTimeout(() => this.writeLink(), 300);
        this.steering = false;
        if (byHand) this.tip.hidden = true;
      },
    };
  }

  /** Points at a node: shows where it is active, its edges, and a few words beside it. */
  point(node, event = null, graph = this.main.graph) {
    const name = node === null ? null : graph.names[node];
    if (name === this.hovered && !event) return;
    const same = name === this.hovered;
    this.hovered = name;
    if (node !== null && event) this.showTip(node, event, graph);
    else this.tip.hidden = true;
    if (!same) this.refocus();
  }

  showTip(node, event, graph) {
    const view = Object.values(this.views).find((one) => one.graph === graph);
    const title = this.title(node, graph);
    fill(this.tip, h("strong", {}, cut(title, 60)), title === graph.names[node] ? null : h("div", { class: "address" }, cut(graph.names[node], 60)),
      h("div", { class: "quiet" }, `influence ${percent(view.influence[node])}`));
    this.tip.hidden = false;
    const wide = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(6, Math.min(event.clientX + 14, window.innerWidth - wide - 8))}px`;
    this.tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - this.tip.offsetHeight - 8)}px`;
  }

  /** Brings the nodes of a group into focus; null for none. */
  pointAtGroup(place) {
    this.groupPointed = place;
    this.refocus();
  }

  /** Marks a patch of the image or a word: the nodes that are active there come into focus. */
  mark(position, text) {
    this.marked = position === null ? null : { position, text };
    this.refocus();
  }

  refocus() {
    if (!this.scenes) return;
    const { view } = this.store;
    for (const scene of this.activeScenes()) {
      if (!scene.look) continue;
      const { graph } = scene.look;
      const at = (name) => (name === null ? undefined : graph.number.get(name));
      const hovered = at(this.hovered) ?? null;
      const selected = at(view.selected) ?? null;
      scene.setFocus(this.focusOf(scene, hovered, selected));
    }
    const { graph } = this.main;
    const shown = graph.number.get(this.hovered) ?? (this.marked ? undefined : graph.number.get(view.selected));
    this.picture.heat(shown ?? null, graph, this.colours, this.marked && !this.marked.text ? this.marked.position : null);
    if (this.marked) this.sayActive();
  }

  activeNodes(graph) {
    const padding = this.picture.words.at(-1) === "padding" ? this.picture.words.length - 1 : null;
    return activeAt(graph, this.marked.text, this.marked.position, padding);
  }

  sayActive() {
    const found = this.activeNodes(this.main.graph).filter(([node]) => this.main.masks.nodes[node]);
    const where = this.marked.text ? `“${this.picture.words[this.marked.position]}”` : "here";
    const names = found.slice(0, 4).map(([node]) => short(this.title(node), 24)).join(", ");
    this.picture.say(found.length ? `${found.length} nodes active at ${where}: ${names}${found.length > 4 ? ", …" : ""}` : `No node in this view is active at ${where}.`);
  }

  focusOf(scene, hovered, selected) {
    const { graph, nodeShown, edgeShown } = scene.look;
    const group = scene.look.groups[this.groupPointed ?? -1];
    if (group) {
      const nodes = group.nodes.filter((node) => nodeShown[node]);
      const members = new Set(nodes);
      const edges = nodes.flatMap((node) => [...edgesOf(graph.into, node)]).filter((e) => edgeShown[e] && members.has(graph.edge_source[e]));
      return { veil: 0.86, nodes, edges, selected: [], hovered: null };
    }
    if (this.marked && hovered === null) {
      const nodes = this.activeNodes(graph).map(([node]) => node).filter((node) => nodeShown[node]);
      return { veil: 0.86, nodes, edges: [], selected: [], hovered: null, word: this.marked.text ? this.marked.position : null };
    }
    if (this.path && graph === this.main.graph && hovered === null) {
      return { veil: 0.88, nodes: this.path.nodes, edges: this.path.edges, selected: selected === null ? [] : [selected], hovered: null };
    }
    const node = hovered ?? selected;
    if (node === null || !nodeShown[node]) return null;
    return { veil: 0.88, ...scene.around(node), selected: selected === null ? [] : [selected], hovered };
  }

  togglePath() {
    if (this.selected() !== null) this.store.look({ path: !this.store.view.path });
    if (this.store.view.path && !this.path) this.say("No path of edges in this view leads from this node to the target.");
  }

  /** Walks to the other end of the strongest edge, or along the row. */
  walk(direction) {
    const { graph, masks, layout } = this.main;
    const node = this.selected();
    if (node === null) return this.select(graph.targets[0].node);
    if (direction === "up" || direction === "down") {
      const list = direction === "up" ? graph.outOf : graph.into;
      const ends = direction === "up" ? graph.edge_target : graph.edge_source;
      let best = -1;
      for (const e of edgesOf(list, node)) {
        if (masks.edges[e] && (best < 0 || Math.abs(graph.edge_attribution[e]) > Math.abs(graph.edge_attribution[best]))) best = e;
      }
      return best < 0 ? undefined : this.select(ends[best]);
    }
    const row = layout.rows.find((one) => one.nodes.includes(node));
    const nodes = row.nodes.filter((n) => masks.nodes[n]).sort((a, b) => layout.x[a] - layout.x[b] || layout.y[a] - layout.y[b]);
    const next = nodes[nodes.indexOf(node) + (direction === "right" ? 1 : -1)];
    return next === undefined ? undefined : this.select(next);
  }

  // What a person makes of the graph.

  pin(node) {
    const name = this.main.graph.names[node];
    this.store.edit((doc) => {
      doc.pinned = doc.pinned.includes(name) ? doc.pinned.filter((one) => one !== name) : [...doc.pinned, name];
    });
  }

  rename(node, text) {
    const name = this.main.graph.names[node];
    this.store.edit((doc) => {
      if (text.trim()) doc.names[name] = text.trim();
      else delete doc.names[name];
    });
  }

  annotate(node, text) {
    const name = this.main.graph.names[node];
    this.store.edit((doc) => {
      if (text.trim()) doc.notes[name] = text;
      else delete doc.notes[name];
    });
  }

  /** Puts a node into a group that is chosen by name, an existing one or a new one. */
  addToGroup(node) {
    const { groups } = this.store.doc;
    const list = h("datalist", { id: "group-names" }, groups.map(({ name }) => h("option", { value: name })));
    const box = h("input", { type: "text", list: "group-names", placeholder: "Name of the group", "aria-label": "Name of the group", maxlength: "200", dir: "auto" });
    const dialog = h("dialog", { class: "ask" }, h("form", { method: "dialog", onsubmit: () => this.group(node, box.value) },
      h("h2", {}, node === null ? "New group" : ["Put ", cut(this.title(node), 40), " into a group"]), box, list,
      h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), h("button", { class: "primary" }, "OK"))));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }

  group(node, title) {
    const name = title.trim();
    if (!name) return;
    const member = node === null ? null : this.main.graph.names[node];
    this.store.edit((doc) => {
      if (member) for (const group of doc.groups) group.members = group.members.filter((one) => one !== member);
      let group = doc.groups.find((one) => one.name === name);
      if (!group) doc.groups.push((group = { name, members: [] }));
      if (member) group.members.push(member);
      doc.groups = doc.groups.filter((one) => one.members.length || one === group);
    });
    this.panel.open("groups");
  }

  renameGroup(place, text) {
    const name = text.trim();
    const { groups } = this.store.doc;
    if (!name || groups.some((group, i) => group.name === name && i !== place)) {
      this.say(name ? "Another group has that name." : "A group needs a name.");
      return this.panel.showGroups();
    }
    this.store.edit((doc) => { doc.groups[place].name = name; });
  }

  removeGroup(place) {
    this.store.edit((doc) => { doc.groups.splice(place, 1); });
  }

  async save() {
    try {
      this.say(await saveGroups(this.extras.name ?? "graph", groupsDocument(this.graphs.a.identity, this.store.doc), this.extras.server));
    } catch (error) {
      this.say(`Not saved. ${error.message}`);
    }
  }

  loadGroups() {
    const chooser = h("input", { type: "file", accept: ".json", hidden: true, class: "groups-file" });
    chooser.addEventListener("change", async () => {
      try {
        const read = readGroups(await chooser.files[0].text(), this.graphs.a.identity);
        this.store.edit((doc) => Object.assign(doc, read));
        this.say("Groups opened.");
      } catch (error) {
        this.say(error.message);
      }
      chooser.remove();
    });
    document.body.append(chooser);
    chooser.click();
  }

  // Search.

  search() {
    const asked = this.searchBox.value.trim().toLowerCase();
    const { graph, influence, masks } = this.main;
    const { doc } = this.store;
    this.found = [];
    if (asked) {
      const grouped = new Map(doc.groups.flatMap(({ name, members }) => members.map((member) => [member, name])));
      for (let n = 0; n < graph.count; n++) {
        const name = graph.names[n];
        const words = [name, graph.labels[n], doc.names[name], doc.notes[name], grouped.get(name)];
        if (words.some((word) => word?.toLowerCase().includes(asked))) this.found.push(n);
      }
      this.found.sort((a, b) => masks.nodes[b] - masks.nodes[a] || influence[b] - influence[a]);
    }
    this.chosen = 0;
    fill(this.results, this.found.slice(0, 12).map((node, place) => h("li", { class: "row", "data-node": graph.names[node], "aria-selected": String(place === 0),
      onpointerdown: (event) => { event.preventDefault(); this.take(node); }, onpointerenter: () => this.point(node), onpointerleave: () => this.point(null) },
    this.panel.nodeName(node, 30), masks.nodes[node] ? null : h("span", { class: "quiet" }, "hidden"))),
    asked && !this.found.length ? h("li", { class: "quiet" }, "Nothing found.") : null);
    this.results.hidden = !asked;
  }

  take(node) {
    this.results.hidden = true;
    this.searchBox.blur();
    this.point(null);
    this.select(node);
  }

  searchKey(event) {
    event.stopPropagation();
    if (event.key === "Escape") {
      this.searchBox.value = "";
      this.results.hidden = true;
      this.searchBox.blur();
    }
    const shown = Math.min(12, this.found?.length ?? 0);
    if (!shown) return;
    if (event.key === "Enter") return this.take(this.found[this.chosen]);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      this.chosen = (this.chosen + (event.key === "ArrowDown" ? 1 : shown - 1)) % shown;
      [...this.results.children].forEach((row, i) => row.setAttribute("aria-selected", String(i === this.chosen)));
      this.point(this.found[this.chosen]);
    }
  }

  // The rest.

  fit() {
    this.store.view.camera = null;
    this.activeScenes().forEach((scene) => scene.fit());
  }

  say(text) {
    this.toast.textContent = short(text, 400);
    this.toast.hidden = false;
    clearTimeout(this.saying);
    this.saying = setTimeout(() => { this.toast.hidden = true; }, 5000);
  }

  exportSvg() {
    download(`${this.extras.name ?? "graph"}.svg`, svgOf(this.scenes.left), "image/svg+xml");
  }

  async exportPng() {
    download(`${this.extras.name ?? "graph"}.png`, await pngOf(this.scenes.left), "image/png");
  }

  writeLink() {
    const state = this.store.link();
    if (location.hash.slice(1) === state) return;
    history.replaceState(null, "", state ? `#${state}` : location.pathname + location.search);
  }

  async copyLink() {
    this.writeLink();
    try {
      await navigator.clipboard.writeText(location.href);
      this.say("The address of this view is copied.");
    } catch {
      this.say("The browser does not let the page copy; the address of this view is in the address bar.");
    }
  }

  /** Returns the address of a feature's page; null if there is none. */
  pageOf(node) {
    const { pages } = this.extras;
    const feature = this.main.graph.features[node];
    return pages && feature ? pages.replaceAll("{feature}", encodeURIComponent(feature).replaceAll("%2F", "/")) : null;
  }

  openPage(node) {
    const address = this.pageOf(node);
    if (!address) return;
    this.pageFrame.src = address;
    this.pageDialog.showModal();
  }

  readTheme() {
    try {
      const kept = localStorage.getItem("difffract-theme");
      if (kept) this.dark = kept === "dark";
    } catch {
      // Pages from disk may have no storage; then the system's theme holds.
    }
  }

  setTheme(dark, keep = true) {
    this.dark = dark;
    try {
      if (keep) localStorage.setItem("difffract-theme", dark ? "dark" : "light");
    } catch {
      // As above.
    }
    this.applyTheme();
    this.redraw();
    this.panel.show();
    this.refocus();
  }

  applyTheme() {
    document.documentElement.dataset.theme = this.dark ? "dark" : "light";
  }
}

export { number };
