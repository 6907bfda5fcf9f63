// The page: one state, one or two drawings, the column beside them, and what joins them.
import { branchOf, edgesOf } from "./data.js";
import { accountOf } from "./account.js";
import { controls, foldButton, frameBox, header, helpBox, legend, zoomButtons } from "./chrome.js";
import { coloursOf, prefersDark } from "./colours.js";
import { cut, download, fill, h, percent, short } from "./dom.js";
import { pngOf, readGroups, svgOf } from "./files.js";
import { Panel } from "./panel.js";
import { strongestPath } from "./paths.js";
import { Picture, activeAt } from "./picture.js";
import { Scene } from "./scene.js";
import { Store } from "./store.js";
import { View } from "./view.js";

export class App {
  constructor(graphs, extras) {
    this.extras = extras;
    this.withoutPage = new Set(extras.without_page ?? []);
    this.graphs = graphs;
    this.views = {};
    for (const [key, graph] of Object.entries(graphs)) this.views[key] = new View(graph);
    this.store = new Store(this.startingDoc(), { selected: null, unfolded: true, show: "a", path: false, camera: null, image: 0 },
      [...Object.keys(graphs), ...(graphs.b ? ["side"] : [])]);
    this.dark = prefersDark();
    this.readTheme();
    this.hovered = null;
    this.marked = null;
  }

  startingDoc() {
    const groups = Object.entries(this.graphs.a.supernodes).map(([name, members]) => ({ name, members }));
    const doc = { ...this.graphs.a.start, groups, names: {}, notes: {}, pinned: [] };
    if (!this.extras.groups) return doc;
    return { ...doc, ...readGroups(JSON.stringify(this.extras.groups), this.graphs.a) };
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
    const notes = { a: this.extras.image_note ?? "", b: this.extras.image_note_b ?? "" };
    const pictureOf = (key) => new Picture(this.graphs[key], this.imagesOf(key), notes[key], pointing);
    this.pictures = { a: pictureOf("a"), ...(this.graphs.b ? { b: pictureOf("b") } : {}) };
    this.panel = new Panel(this);
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    this.toast = h("div", { class: "toast", role: "alert", hidden: true });
    root.append(h("div", { class: "page" }, header(this),
      h("main", {}, h("div", { class: "drawing" }, h("div", { class: "above" }, legend(this), foldButton(this), zoomButtons(this)), this.stage, controls(this)),
        h("aside", {}, Object.values(this.pictures).map((picture) => picture.element), this.panel.element)),
      this.tip, this.toast, helpBox(this), frameBox(this)));
    this.store.listen((what) => this.changed(what));
    this.loadImages();
    this.store.follow(location.hash.slice(1));
    window.addEventListener("hashchange", () => this.store.follow(location.hash.slice(1)));
    window.matchMedia?.("(prefers-color-scheme: dark)").addEventListener("change", (event) => this.setTheme(event.matches, false));
    this.applyTheme();
    this.refresh();
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
    const branch = branchOf(graph, node);
    return given || (label && label + step + (branch && ` ~${branch}`)) || graph.names[node];
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
      h("div", { class: "quiet" }, `influence ${percent(view.influence[node])}${branchOf(graph, node) ? ` · ${branchOf(graph, node)} branch` : ""}`));
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
    const active = this.activeNodes(this.main.graph).filter(([node]) => this.main.masks.nodes[node]);
    const where = this.marked.text ? `“${this.picture.words[this.marked.position]}”` : "here";
    const names = active.slice(0, 4).map(([node]) => short(this.title(node), 24)).join(", ");
    this.picture.say(active.length ? `${active.length} nodes active at ${where}: ${names}${active.length > 4 ? ", …" : ""}` : `No node in this view is active at ${where}.`);
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
    if (this.extras.notebook) return; // a frame in a notebook has no address
    const state = this.store.link();
    if (location.hash.slice(1) === state) return;
    history.replaceState(null, "", state ? `#${state}` : location.pathname + location.search);
  }

  async copyLink() {
    if (this.extras.notebook) return this.say("A page in a notebook has no address; save it as a file from Python.");
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
    return pages && feature && !this.withoutPage.has(feature) ? pages.replaceAll("{feature}", encodeURIComponent(feature).replaceAll("%2F", "/")) : null;
  }

  openPage(node) {
    const address = this.pageOf(node);
    if (!address) return;
    this.pageFrame.src = address;
    this.pageLink.href = address;
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
    this.sendTheme();
  }

  /** Tells the feature's page in the panel which theme this page is in; it is of another origin, also from disk. */
  sendTheme() {
    this.pageFrame?.contentWindow?.postMessage({ difffractTheme: this.dark ? "dark" : "light" }, "*");
  }
}
