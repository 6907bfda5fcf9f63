// Small maps of where features are active over the image, from one sprite sheet.
import { TXT, mapOf } from "./data.js";
import { radius, screen } from "./frame.js";

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
export function paintThumbnails(ctx, look, frame) {
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
