// One graph on a canvas: zoom, hover, click. Two canvases lie on each other. The lower one holds the whole drawing; while
// it is dragged or zoomed, a bitmap of the last whole drawing is moved, with the strongest edges drawn anew, and the
// whole is drawn again once it rests. The upper one holds what is in focus, over a veil.
import { quadtree } from "d3-quadtree";
import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { edgesOf } from "./data.js";
import { h } from "./dom.js";
import { paintGutters } from "./axes.js";
import { GUTTER, STEPS, screen } from "./frame.js";
import { paintLabels } from "./labels.js";
import { paint, paintEdges, paintNodes, ring } from "./painter.js";

const REST = 90;
const STRONGEST = 160;
const REACH = 16;

export class Scene {
  constructor(name, on) {
    this.canvas = h("canvas", { class: "base", "aria-hidden": "true" });
    this.over = h("canvas", { class: "over", tabindex: "0", role: "img", "aria-label": name });
    this.element = h("div", { class: "scene" }, this.canvas, this.over);
    this.cache = document.createElement("canvas");
    this.cached = null;
    this.on = on;
    this.frame = { k: 1, x: 0, y: 0, width: 0, height: 0 };
    this.focus = null;
    this.timings = { full: 0, frames: [] };
    this.zoom = zoom()
      .scaleExtent([0.1, 24])
      .clickDistance(5)
      .on("zoom", (event) => this.move(event.transform, event.sourceEvent !== null))
      .on("end", (event) => { if (event.sourceEvent?.type !== "wheel") this.rest(); });
    select(this.over).call(this.zoom).on("dblclick.zoom", null);
    this.over.addEventListener("pointermove", (event) => this.hover(event));
    this.over.addEventListener("pointerleave", () => this.on.hover(null));
    this.over.addEventListener("click", (event) => this.on.select(this.nodeAt(event), event));
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  resize() {
    const width = this.element.clientWidth;
    const height = this.element.clientHeight;
    if (!width || !height || (width === this.frame.width && height === this.frame.height)) return;
    const first = !this.frame.width;
    const before = this.frame;
    this.frame = { ...this.frame, width, height };
    this.ratio = Math.min(2, window.devicePixelRatio || 1);
    for (const canvas of [this.canvas, this.over, this.cache]) {
      canvas.width = Math.round(width * this.ratio);
      canvas.height = Math.round(height * this.ratio);
    }
    this.cached = null;
    this.on.resized();
    if (!this.look) return;
    if (first || this.fitted) this.fit(false);
    else this.place({ k: before.k, x: before.x, y: before.y });
    this.draw();
  }

  /** Shows a look: a graph, its layout, what of it is shown, and how. */
  show(look) {
    const moved = this.look?.layout !== look.layout;
    this.look = look;
    this.tree = quadtree(
      look.shownNodes,
      (node) => look.layout.x[node],
      (node) => look.layout.y[node],
    );
    this.strongest = look.strongest.slice(0, STRONGEST);
    if (moved && this.frame.width) this.fit(false);
    this.draw();
  }

  /** Returns the height of the room there is for nodes over its width. */
  aspect(several) {
    const wide = this.frame.width - GUTTER.left - GUTTER.right - 16 - (several ? STEPS : 0);
    return (this.frame.height - GUTTER.bottom - GUTTER.top - 46) / Math.max(60, wide);
  }

  /** Returns the transform that shows the whole graph. */
  fitting() {
    const { width, height } = this.frame;
    const { layout } = this.look;
    const right = GUTTER.right + (layout.rows.some((row) => row.several) ? STEPS : 0);
    const wide = Math.max(60, width - GUTTER.left - right - 16);
    const high = Math.max(60, height - GUTTER.bottom - GUTTER.top - 36);
    const k = Math.min(wide / layout.width, high / Math.max(layout.height, 40), 2.2);
    const x = GUTTER.left + 8 + (wide - layout.width * k) / 2;
    const y = GUTTER.top + 18 + layout.height * k + (high - layout.height * k) / 2;
    return { k, x, y };
  }

  fit(tell = true) {
    this.place(this.fitting());
    this.fitted = true;
    if (tell) this.on.camera(null);
    this.rest();
  }

  /** Moves the view without telling anybody. */
  place({ k, x, y }) {
    this.quiet = true;
    select(this.over).call(this.zoom.transform, zoomIdentity.translate(x, y).scale(k));
    this.quiet = false;
  }

  zoomBy(factor) {
    select(this.over).call(this.zoom.scaleBy, factor);
  }

  move(transform, byHand) {
    Object.assign(this.frame, { k: transform.k, x: transform.x, y: transform.y });
    if (!this.quiet) {
      this.fitted = false;
      this.on.camera({ k: transform.k, x: transform.x, y: transform.y }, byHand);
    }
    this.moving = true;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.rest(), REST);
    this.schedule();
  }

  /** Draws the whole again, once nothing moves any more. */
  rest() {
    clearTimeout(this.timer);
    if (!this.moving) return;
    this.moving = false;
    this.draw();
  }

  draw() {
    this.dirty = true;
    this.schedule();
  }

  schedule() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      if (this.look && this.frame.width) this.render();
    });
  }

  context(canvas) {
    const ctx = canvas.getContext("2d");
    ctx.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    return ctx;
  }

  render() {
    const began = performance.now();
    this.look.scale = Math.min(1, Math.max(0.28, (this.frame.k * this.look.layout.apart) / 17));
    if (this.moving && this.cached) this.renderMoving();
    else if (this.dirty || this.moving) this.renderFull(began);
    this.renderFocus();
    this.timings.frames.push(performance.now() - began);
    if (this.timings.frames.length > 2000) this.timings.frames.shift();
  }

  renderFull(began) {
    this.dirty = false;
    const ctx = this.context(this.cache);
    paint(ctx, this.look, this.frame);
    this.cached = { k: this.frame.k, x: this.frame.x, y: this.frame.y };
    const base = this.context(this.canvas);
    base.drawImage(this.cache, 0, 0, this.frame.width, this.frame.height);
    this.timings.full = performance.now() - began;
    this.timings.drawn = performance.now();
    this.timings.firstDrawn ??= this.timings.drawn;
    this.on.drawn?.();
  }

  /** Draws the last whole drawing where it would be now, and the strongest edges and nodes at their sizes. */
  renderMoving() {
    const { frame, cached } = this;
    const ctx = this.context(this.canvas);
    const scale = frame.k / cached.k;
    ctx.globalAlpha = 1;
    ctx.fillStyle = this.look.colours.paper;
    ctx.fillRect(0, 0, frame.width, frame.height);
    ctx.imageSmoothingEnabled = scale < 1;
    const x = frame.x - cached.x * scale;
    const y = frame.y - cached.y * scale;
    ctx.drawImage(this.cache, x, y, frame.width * scale, frame.height * scale);
    ctx.imageSmoothingEnabled = true;
    paintEdges(ctx, this.look, frame, this.strongest);
    paintGutters(ctx, this.look, frame);
  }

  /** Shows some nodes and edges over a veil; null for none. */
  setFocus(focus) {
    this.focus = focus;
    this.schedule();
  }

  renderFocus() {
    const ctx = this.context(this.over);
    const { frame, look, focus } = this;
    ctx.clearRect(0, 0, frame.width, frame.height);
    if (!focus) return;
    if (focus.veil) {
      ctx.globalAlpha = focus.veil;
      ctx.fillStyle = look.colours.paper;
      ctx.fillRect(GUTTER.left - 12, 0, frame.width, frame.height - GUTTER.bottom);
      ctx.globalAlpha = 1;
    }
    paintEdges(ctx, look, frame, focus.edges, 1.35);
    paintNodes(ctx, look, frame, focus.nodes);
    if (focus.selected?.length) ring(ctx, look, frame, focus.selected, look.colours.select, 4, 2.4);
    if (focus.hovered !== null && focus.hovered !== undefined) ring(ctx, look, frame, [focus.hovered], look.colours.ink, 2.5, 1.5);
    paintLabels(ctx, look, frame, focus.nodes, true);
    paintGutters(ctx, { ...look, markedWord: focus.word }, frame);
  }

  /** Returns the node under the pointer, the nearest in reach; null for none. */
  nodeAt(event) {
    if (!this.look) return null;
    const box = this.over.getBoundingClientRect();
    const sx = event.clientX - box.left;
    const sy = event.clientY - box.top;
    if (sy > this.frame.height - GUTTER.bottom) return null;
    const { k, x, y } = this.frame;
    const reach = event.pointerType === "touch" ? 1.6 * REACH : REACH;
    const node = this.tree.find((sx - x) / k, (sy - y) / k, reach / k);
    return node ?? null;
  }

  /** Returns the column of words under the pointer, in the axis below; null for none. */
  wordAt(event) {
    const box = this.over.getBoundingClientRect();
    const { layout } = this.look;
    if (event.clientY - box.top < this.frame.height - GUTTER.bottom || !layout.zones.text) return null;
    const at = (event.clientX - box.left - this.frame.x) / this.frame.k;
    const [from, to] = layout.zones.text;
    const column = Math.floor(((at - from) / (to - from)) * layout.words.length);
    return column >= 0 && column < layout.words.length ? column : null;
  }

  hover(event) {
    if (!this.look || event.buttons) return;
    const node = this.nodeAt(event);
    this.over.style.cursor = node === null ? "grab" : "pointer";
    this.on.hover(node, event, node === null ? this.wordAt(event) : null);
  }

  /** Returns where a node is on the page, for tests and for the tooltip. */
  pageOf(node) {
    const box = this.over.getBoundingClientRect();
    const [x, y] = screen(this.frame, this.look, node);
    return [box.left + x, box.top + y];
  }

  /** Returns what is in focus with a node: its edges that are shown, and the nodes at their ends. */
  around(node) {
    const { graph, edgeShown } = this.look;
    const edges = [...edgesOf(graph.into, node), ...edgesOf(graph.outOf, node)].filter((e) => edgeShown[e]);
    const nodes = new Set([node]);
    for (const e of edges) nodes.add(graph.edge_source[e]).add(graph.edge_target[e]);
    return { edges, nodes: [...nodes] };
  }
}
