// Draws a graph to a canvas, or to anything with a canvas's calls (svg.js). Positions are screen pixels; sizes do not
// grow with the zoom, so that lines and text stay crisp.
import { paintGutters } from "./axes.js";
import { ERROR, INPUT, OUTPUT, REST, SCORE, TXT, WORD, branchOf } from "./data.js";
import { paintDensity } from "./density.js";
import { GUTTER, radius, screen } from "./frame.js";
import { paintLabels } from "./labels.js";
import { paintThumbnails } from "./maps.js";

const BINS = 7;
/** Edges up to which each is drawn as a curve; of more, this many of the strongest are, and the others as a density. */
const CURVED = 4000;
const STRONGEST = 700;

/** Draws rows, edges, nodes and labels. */
export function paint(ctx, look, frame) {
  ctx.globalAlpha = 1;
  ctx.fillStyle = look.colours.paper;
  ctx.fillRect(0, 0, frame.width, frame.height);
  paintRows(ctx, look, frame);
  if (look.shownEdges.length <= CURVED || ctx.isVector) paintEdges(ctx, look, frame, look.shownEdges.slice(-CURVED));
  else {
    paintDensity(ctx, look, frame, look.shownEdges.slice(0, -STRONGEST));
    paintEdges(ctx, look, frame, look.shownEdges.slice(-STRONGEST), 0.75);
  }
  paintGroups(ctx, look, frame);
  paintNodes(ctx, look, frame, look.shownNodes);
  paintThumbnails(ctx, look, frame);
  paintLabels(ctx, look, frame, look.labelled);
  paintGutters(ctx, look, frame);
}

function paintRows(ctx, look, frame) {
  const { layout, colours } = look;
  const left = Math.max(GUTTER.left, frame.x - 12);
  const right = Math.min(frame.width - GUTTER.right + 8, layout.width * frame.k + frame.x + 12);
  const bands = new Map();
  for (const row of layout.rows) {
    if (!row.several) continue;
    const band = bands.get(row.step) ?? [Infinity, -Infinity];
    bands.set(row.step, [Math.min(band[0], row.top), Math.max(band[1], row.bottom)]);
  }
  let odd = false;
  for (const [top, bottom] of bands.values()) {
    odd = !odd;
    if (!odd) continue;
    ctx.fillStyle = colours.band;
    ctx.fillRect(left, (top - 20) * frame.k + frame.y, right - left, (bottom - top + 40) * frame.k);
  }
  ctx.strokeStyle = colours.rule;
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (const row of layout.rows) {
    const y = Math.round(((row.top + row.bottom) / 2) * frame.k + frame.y) + 0.5;
    if (y < 0 || y > frame.height) continue;
    ctx.moveTo(left, y);
    ctx.lineTo(right, y);
  }
  ctx.stroke();
}

/** Draws edges in a few strokes: the weakest first, one stroke for each sign and width. */
export function paintEdges(ctx, look, frame, edges, strong = 1) {
  const { graph, colours, strength } = look;
  const { edge_source: source, edge_target: target, edge_attribution: value } = graph;
  const bins = Array.from({ length: 2 * BINS }, () => []);
  for (const e of edges) {
    const bin = Math.min(BINS - 1, Math.floor(strength[e] * BINS));
    bins[2 * bin + (value[e] < 0 ? 1 : 0)].push(e);
  }
  const { x, y } = look.layout;
  bins.forEach((mine, place) => {
    if (!mine.length) return;
    const level = (Math.floor(place / 2) + 0.5) / BINS;
    ctx.strokeStyle = place % 2 ? colours.negative : colours.positive;
    ctx.lineWidth = 0.6 + 4 * level * level * strong;
    ctx.globalAlpha = Math.min(1, (0.16 + 0.6 * level) * strong);
    ctx.beginPath();
    for (const e of mine) {
      const sx = x[source[e]] * frame.k + frame.x;
      const sy = y[source[e]] * frame.k + frame.y;
      const tx = x[target[e]] * frame.k + frame.x;
      const ty = y[target[e]] * frame.k + frame.y;
      if ((sy < 0 && ty < 0) || (sy > frame.height && ty > frame.height)) continue;
      if ((sx < 0 && tx < 0) || (sx > frame.width && tx > frame.width)) continue;
      ctx.moveTo(sx, sy);
      const bend = (ty - sy) * 0.45;
      ctx.bezierCurveTo(sx, sy + bend, tx, ty - bend, tx, ty);
    }
    ctx.stroke();
  });
  ctx.globalAlpha = 1;
}

function shape(ctx, kind, x, y, r) {
  if (kind === INPUT || kind === WORD) {
    ctx.moveTo(x - r, y - r);
    ctx.lineTo(x + r, y - r);
    ctx.lineTo(x + r, y + r);
    ctx.lineTo(x - r, y + r);
    ctx.closePath();
  } else if (kind === ERROR) {
    ctx.moveTo(x, y - r * 1.25);
    ctx.lineTo(x + r * 1.25, y);
    ctx.lineTo(x, y + r * 1.25);
    ctx.lineTo(x - r * 1.25, y);
    ctx.closePath();
  } else if (kind === REST) {
    ctx.moveTo(x, y - r * 1.2);
    ctx.lineTo(x + r * 1.15, y + r * 0.85);
    ctx.lineTo(x - r * 1.15, y + r * 0.85);
    ctx.closePath();
  } else if (kind === SCORE) {
    ctx.moveTo(x - r * 1.2, y - r);
    ctx.lineTo(x + r * 1.2, y - r);
    ctx.lineTo(x - r * 1.2, y + r);
    ctx.lineTo(x + r * 1.2, y + r);
    ctx.closePath();
  } else {
    ctx.moveTo(x + r, y);
    ctx.arc(x, y, r, 0, 2 * Math.PI);
  }
}

/** Returns the colour that a node is filled with. */
export function colourOf(look, node) {
  const { graph, colours } = look;
  const kind = graph.node_kind[node];
  if (kind === OUTPUT || graph.isTarget[node]) return colours.ink;
  if (kind === ERROR) return colours.error;
  if (kind === REST) return colours.rest;
  if (kind === SCORE) return colours.score;
  return graph.node_stream[node] === TXT ? colours.text : colours.image;
}

/** Draws nodes, batched by shape and colour; those of the negative branch of guidance are hollow. */
export function paintNodes(ctx, look, frame, nodes) {
  const { graph, colours } = look;
  const batches = new Map();
  for (const node of nodes) {
    const kind = graph.isTarget[node] ? OUTPUT : graph.node_kind[node];
    const key = `${kind}/${branchOf(graph, node) === "negative" ? 1 : 0}/${colourOf(look, node)}`;
    if (!batches.has(key)) batches.set(key, []);
    batches.get(key).push(node);
  }
  for (const [key, mine] of batches) {
    const [kind, hollow] = key.split("/", 2).map(Number);
    const colour = key.slice(key.indexOf("/", 2) + 1);
    ctx.fillStyle = hollow ? colours.paper : colour;
    ctx.strokeStyle = hollow ? colour : colours.paper;
    ctx.lineWidth = hollow ? 2 : 1.4;
    ctx.beginPath();
    for (const node of mine) {
      const [x, y] = screen(frame, look, node);
      if (x < -20 || y < -20 || x > frame.width + 20 || y > frame.height + 20) continue;
      shape(ctx, kind, x, y, radius(look, node));
    }
    if (hollow) ctx.fill();
    if (hollow || nodes.length < 1500) ctx.stroke();
    if (!hollow) ctx.fill();
  }
  ring(ctx, look, frame, nodes.filter((node) => graph.isTarget[node]), colours.ink, 3.5, 1.4);
  const pinned = nodes.filter((node) => look.pinned.has(node));
  ring(ctx, look, frame, pinned, colours.pin, 3, 2);
}

/** Draws a ring around some nodes. */
export function ring(ctx, look, frame, nodes, colour, out, width) {
  if (!nodes.length) return;
  ctx.strokeStyle = colour;
  ctx.lineWidth = width;
  ctx.beginPath();
  for (const node of nodes) {
    const [x, y] = screen(frame, look, node);
    const r = radius(look, node) + out;
    ctx.moveTo(x + r, y);
    ctx.arc(x, y, r, 0, 2 * Math.PI);
  }
  ctx.stroke();
}

/** Draws what is shown of every group: a soft halo around its members, and its name. */
function paintGroups(ctx, look, frame) {
  look.groups.forEach((group, place) => {
    const members = group.nodes.filter((node) => look.nodeShown[node]);
    if (!members.length) return;
    const colour = look.colours.groups[place % look.colours.groups.length];
    ctx.fillStyle = colour;
    ctx.globalAlpha = 0.28;
    ctx.beginPath();
    for (const node of members) {
      const [x, y] = screen(frame, look, node);
      const r = radius(look, node) + 7;
      ctx.moveTo(x + r, y);
      ctx.arc(x, y, r, 0, 2 * Math.PI);
    }
    ctx.fill();
    ctx.globalAlpha = 1;
  });
}
