// The axes of the drawing: names of rows, words below, the image squeezed to one line, steps at the right.
import { TXT } from "./data.js";
import { short } from "./dom.js";
import { FONT, GUTTER } from "./frame.js";
import { columnCentre } from "./layout.js";

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
