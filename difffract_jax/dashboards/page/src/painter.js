// Draws a graph to a canvas, or to anything with a canvas's calls (svg.js). Positions are screen pixels; sizes do not
// grow with the zoom, so that lines and text stay crisp.
import { ERROR, FEATURE, INPUT, OUTPUT, REST, TXT, mapOf } from "./data.js";
import { paintDensity } from "./density.js";
import { columnCentre } from "./layout.js";
import { short } from "./dom.js";

export const GUTTER = { left: 86, bottom: 46, top: 14, right: 18 };
/** Room at the right for the steps' names and images, where steps are unfolded. */
export const STEPS = 78;
const BINS = 7;
const FONT = '"Inter", system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const CELL = 8;
/** Edges up to which each is drawn as a curve; of more, this many of the strongest are, and the others as a density. */
const CURVED = 4000;
const STRONGEST = 700;

/** Returns the radius of a node in pixels, by its influence over the largest. */
export function radius(look, node) {
  const { graph, influence, most } = look;
  if (graph.isTarget[node]) return 8.5;
  const base = graph.node_kind[node] === FEATURE ? 3.6 : 3;
  return (base + 5.2 * Math.sqrt(Math.max(0, influence[node]) / most)) * look.scale;
}

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

export const screen = (frame, look, node) => [
  look.layout.x[node] * frame.k + frame.x,
  look.layout.y[node] * frame.k + frame.y,
];

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
  if (kind === INPUT) {
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
  return graph.node_stream[node] === TXT ? colours.text : colours.image;
}

/** Draws nodes, batched by shape and colour. */
export function paintNodes(ctx, look, frame, nodes) {
  const { graph, colours } = look;
  const batches = new Map();
  for (const node of nodes) {
    const kind = graph.isTarget[node] ? OUTPUT : graph.node_kind[node];
    const key = `${kind}/${colourOf(look, node)}`;
    if (!batches.has(key)) batches.set(key, []);
    batches.get(key).push(node);
  }
  for (const [key, mine] of batches) {
    const kind = Number(key.split("/")[0]);
    ctx.fillStyle = key.slice(key.indexOf("/") + 1);
    ctx.strokeStyle = colours.paper;
    ctx.lineWidth = 1.4;
    ctx.beginPath();
    for (const node of mine) {
      const [x, y] = screen(frame, look, node);
      if (x < -20 || y < -20 || x > frame.width + 20 || y > frame.height + 20) continue;
      shape(ctx, kind, x, y, radius(look, node));
    }
    if (nodes.length < 1500) ctx.stroke();
    ctx.fill();
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

/** Returns where the small map of a node is drawn, [left, top, width, height]; null for none, or where there is no room. */
export function thumbnailBox(look, frame, node) {
  const room = frame.k * Math.min(look.layout.apart, 0.75 * look.layout.tall);
  if (room < 50 || !look.atlas?.tiles.has(node)) return null;
  const height = Math.min(46, 0.62 * room);
  const width = height * Math.min(1.6, look.atlas.columns / look.atlas.rows);
  const [x, y] = screen(frame, look, node);
  if (x < 0 || y < 0 || x > frame.width || y > frame.height) return null;
  return [x - width / 2, y - radius(look, node) - height - 4, width, height];
}

/** Draws small maps of where image features are active, from one sprite sheet. */
function paintThumbnails(ctx, look, frame) {
  if (ctx.isVector) return;
  ctx.imageSmoothingEnabled = false;
  ctx.strokeStyle = look.colours.line;
  ctx.lineWidth = 1;
  for (const node of look.shownNodes) {
    const box = thumbnailBox(look, frame, node);
    if (!box) continue;
    const [left, top] = look.atlas.tiles.get(node);
    ctx.fillStyle = look.colours.paper;
    ctx.fillRect(...box);
    ctx.drawImage(look.atlas.canvas, left, top, look.atlas.columns, look.atlas.rows, ...box);
    ctx.strokeRect(...box);
  }
  ctx.imageSmoothingEnabled = true;
}

/** Draws names beside nodes, the most influential first, where they cover nothing. */
export function paintLabels(ctx, look, frame, nodes, veiled = false) {
  const columns = Math.ceil(frame.width / CELL);
  const rows = Math.ceil(frame.height / CELL);
  const taken = new Uint8Array(columns * rows);
  const claim = (x0, y0, x1, y1, only) => {
    const [a, b] = [Math.max(0, Math.floor(x0 / CELL)), Math.min(columns - 1, Math.floor(x1 / CELL))];
    const [c, d] = [Math.max(0, Math.floor(y0 / CELL)), Math.min(rows - 1, Math.floor(y1 / CELL))];
    if (only) for (let j = c; j <= d; j++) for (let i = a; i <= b; i++) if (taken[j * columns + i]) return false;
    for (let j = c; j <= d; j++) for (let i = a; i <= b; i++) taken[j * columns + i] = 1;
    return true;
  };
  const several = look.layout.rows.some((row) => row.several);
  const dots = veiled ? nodes : look.shownNodes;
  for (const node of dots) {
    const [x, y] = screen(frame, look, node);
    const r = radius(look, node);
    if (x > 0 && y > 0 && x < frame.width && y < frame.height) claim(x - r + 1, y - r + 1, x + r - 1, y + r - 1, false);
    const box = veiled ? null : thumbnailBox(look, frame, node);
    if (box) claim(box[0], box[1], box[0] + box[2], box[1] + box[3], false);
  }
  if (!veiled) paintGroupNames(ctx, look, frame, claim);
  ctx.textBaseline = "middle";
  for (const node of nodes) {
    const [x, y] = screen(frame, look, node);
    if (x < GUTTER.left - 10 || y < 4 || x > frame.width || y > frame.height - GUTTER.bottom) continue;
    const target = look.graph.isTarget[node];
    ctx.font = `${target ? "600 12.5px" : "500 11.5px"} ${FONT}`;
    const text = short(look.title(node), target ? 48 : 26);
    const width = ctx.measureText(text).width;
    const r = radius(look, node) + (target ? 7 : 5);
    const spots = [
      [x + r, y - 7, "left"],
      [x - r - width, y - 7, "left"],
      [x - width / 2, y - r - 14, "left"],
      [x - width / 2, y + r, "left"],
    ];
    for (const [wanted, top] of spots) {
      let left = wanted;
      const last = target && left === spots[3][0] && top === spots[3][1];
      const [from, to] = [GUTTER.left - 10, frame.width - (several ? STEPS : 2)];
      if (last) left = Math.max(from, Math.min(to - width, left));
      if (!last && (left < from || left + width > to)) continue;
      if (!claim(left, top, left + width, top + 13, !last)) continue;
      ctx.textAlign = "left";
      ctx.lineJoin = "round";
      ctx.lineWidth = 3.5;
      ctx.strokeStyle = look.colours.paper;
      ctx.strokeText(text, left, top + 7);
      ctx.fillStyle = look.colours.ink;
      ctx.fillText(text, left, top + 7);
      break;
    }
  }
}

/** Draws the names that groups were given by hand, above the topmost member of each; found groups have none of their own. */
function paintGroupNames(ctx, look, frame, claim) {
  for (const group of look.groups) {
    const members = group.nodes.filter((node) => look.nodeShown[node]);
    if (!members.length || / and \d+ more$/.test(group.name)) continue;
    const top = members.reduce((a, b) => (look.layout.y[a] <= look.layout.y[b] ? a : b));
    const [x, y] = screen(frame, look, top);
    ctx.font = `italic 600 11.5px ${FONT}`;
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    const text = short(group.name, 28);
    const half = ctx.measureText(text).width / 2;
    const line = y - radius(look, top) - 15;
    if (line < 8 || !claim(x - half, line - 7, x + half, line + 6, true)) continue;
    ctx.lineJoin = "round";
    ctx.lineWidth = 3.5;
    ctx.strokeStyle = look.colours.paper;
    ctx.strokeText(text, x, line);
    ctx.fillStyle = look.colours.ink;
    ctx.fillText(text, x, line);
  }
}

/** Draws the axes over the edges of the drawing: names of rows, words, and the image squeezed to one line. */
export function paintGutters(ctx, look, frame) {
  const { colours, layout } = look;
  const low = frame.height - GUTTER.bottom;
  ctx.globalAlpha = 1;
  ctx.fillStyle = colours.paper;
  ctx.fillRect(0, 0, GUTTER.left - 12, frame.height);
  ctx.fillRect(0, low, frame.width, GUTTER.bottom);
  ctx.strokeStyle = colours.line;
  ctx.lineWidth = 1;
  ctx.beginPath();
  ctx.moveTo(GUTTER.left - 12, low + 0.5);
  ctx.lineTo(frame.width, low + 0.5);
  ctx.stroke();
  paintRowNames(ctx, look, frame, low);
  paintWords(ctx, look, frame, low);
  paintStrip(ctx, look, frame, low);
  if (layout.zones.text && layout.zones.image) {
    const x = ((layout.zones.text[1] + layout.zones.image[0]) / 2) * frame.k + frame.x;
    ctx.strokeStyle = colours.line;
    ctx.beginPath();
    ctx.moveTo(x, low + 6);
    ctx.lineTo(x, frame.height - 6);
    ctx.stroke();
  }
}

function paintRowNames(ctx, look, frame, low) {
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  let last = Infinity;
  for (const row of look.layout.rows) {
    const y = ((row.top + row.bottom) / 2) * frame.k + frame.y;
    if (y < 6 || y > low - 6 || last - y < 13) continue;
    last = y;
    ctx.font = `11px ${FONT}`;
    ctx.fillStyle = look.colours.muted;
    ctx.fillText(row.name, GUTTER.left - 20, y);
  }
  if (!look.layout.rows.some((row) => row.several)) return;
  ctx.textAlign = "left";
  const seen = new Set();
  for (const row of look.layout.rows) {
    if (seen.has(row.step)) continue;
    seen.add(row.step);
    const mine = look.layout.rows.filter((one) => one.step === row.step);
    const top = Math.min(...mine.map((one) => one.top)) * frame.k + frame.y;
    const bottom = Math.max(...mine.map((one) => one.bottom)) * frame.k + frame.y;
    const image = look.stepImage?.(row.step);
    const y = Math.max(top, 16);
    const side = Math.min(64, bottom - y - 14, low - y - 14);
    if (y > low - 20 || bottom < 0) continue;
    ctx.font = `600 11px ${FONT}`;
    ctx.fillStyle = look.colours.muted;
    ctx.textAlign = "right";
    ctx.fillText(`step ${row.step}`, frame.width - 8, y);
    if (image && side > 20 && ctx.drawImage) {
      ctx.imageSmoothingEnabled = false;
      ctx.drawImage(image, frame.width - 8 - side, y + 9, side, side);
      ctx.imageSmoothingEnabled = true;
    }
  }
}

function paintWords(ctx, look, frame, low) {
  const { layout, colours } = look;
  if (!layout.zones.text) return;
  ctx.textBaseline = "middle";
  ctx.textAlign = "center";
  const ends = [-Infinity, -Infinity];
  layout.words.forEach((word, i) => {
    const x = columnCentre(layout, TXT, i, layout.words.length) * frame.k + frame.x;
    if (x < GUTTER.left || x > frame.width) return;
    const marked = look.markedWord === i;
    ctx.font = `${marked ? "700" : "500"} 12px ${FONT}`;
    const text = short(word, 14);
    const half = ctx.measureText(text).width / 2 + 4;
    const line = x - half > ends[0] ? 0 : x - half > ends[1] ? 1 : -1;
    if (line < 0) return;
    ends[line] = x + half;
    ctx.fillStyle = marked ? colours.text : word === "padding" ? colours.muted : colours.ink;
    ctx.fillText(text, x, low + 14 + 17 * line);
  });
}

function paintStrip(ctx, look, frame, low) {
  const { layout, colours, image } = look;
  if (!layout.zones.image) return;
  const x0 = layout.zones.image[0] * frame.k + frame.x;
  const x1 = layout.zones.image[1] * frame.k + frame.x;
  ctx.textBaseline = "middle";
  if (image && ctx.drawImage) {
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(image, x0, low + 5, x1 - x0, 22);
    ctx.imageSmoothingEnabled = true;
  }
  ctx.font = `11px ${FONT}`;
  ctx.fillStyle = colours.muted;
  const y = image ? low + 36 : low + 16;
  const words = look.graph.grid ? [x1 - x0 > 180 ? "left of the image" : "left", "right"] : ["image", ""];
  ctx.textAlign = "left";
  ctx.fillText(words[0], Math.max(x0, GUTTER.left), y);
  ctx.textAlign = "right";
  if (words[1]) ctx.fillText(words[1], Math.min(x1, frame.width - 6), y);
}

/** Makes the sprite sheet: one tile of grid cells for every node with a map over the image. */
export function makeAtlas(graph, colour) {
  if (!graph.grid || typeof document === "undefined") return null;
  const [rows, columns] = graph.grid;
  if (rows * columns > 4096) return null;
  const nodes = [];
  for (let n = 0; n < graph.count; n++) {
    if (graph.node_stream[n] !== TXT && graph.map_indptr[n + 1] > graph.map_indptr[n]) nodes.push(n);
  }
  const across = Math.max(1, Math.floor(2048 / columns));
  const kept = nodes.slice(0, across * Math.max(1, Math.floor(4096 / rows)));
  if (!kept.length) return null;
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(kept.length, across) * columns;
  canvas.height = Math.ceil(kept.length / across) * rows;
  const ctx = canvas.getContext("2d");
  const sheet = ctx.createImageData(canvas.width, canvas.height);
  const tiles = new Map();
  kept.forEach((node, i) => {
    const x0 = (i % across) * columns;
    const y0 = Math.floor(i / across) * rows;
    tiles.set(node, [x0, y0]);
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        const at = 4 * ((y0 + y) * canvas.width + x0 + x);
        sheet.data.set([128, 132, 140, 60], at);
      }
    }
    const [positions, values] = mapOf(graph, node);
    let most = 0;
    for (const value of values) most = Math.max(most, Math.abs(value));
    for (let p = 0; p < positions.length; p++) {
      if (positions[p] >= rows * columns || !most) continue;
      const at = 4 * ((y0 + Math.floor(positions[p] / columns)) * canvas.width + x0 + (positions[p] % columns));
      const share = Math.abs(values[p]) / most;
      sheet.data.set([colour[0], colour[1], colour[2], 60 + 195 * share], at);
    }
  });
  ctx.putImageData(sheet, 0, 0);
  return { canvas, tiles, rows, columns };
}
