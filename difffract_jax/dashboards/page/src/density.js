// Many weak edges as a density: every edge is a straight line of numbers added up per pixel, and the sums become one
// picture, so that tens of thousands take a few hundredths of a second and do not cover each other.

const SHADE = 0.6;
let scratch = null;

/** Draws edges as a density, raising and lowering ones in their colours. */
export function paintDensity(ctx, look, frame, edges) {
  const width = Math.ceil(frame.width);
  const height = Math.ceil(frame.height);
  if (!scratch || scratch.canvas.width !== width || scratch.canvas.height !== height) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    scratch = { canvas, context, raising: new Float32Array(width * height), lowering: new Float32Array(width * height), picture: context.createImageData(width, height) };
  }
  const { canvas, context, raising, lowering, picture } = scratch;
  raising.fill(0);
  lowering.fill(0);
  const { edge_source: source, edge_target: target, edge_attribution: value } = look.graph;
  const { x, y } = look.layout;
  for (const e of edges) {
    const s = source[e];
    const t = target[e];
    addLine(value[e] < 0 ? lowering : raising, width, height, x[s] * frame.k + frame.x, y[s] * frame.k + frame.y,
      x[t] * frame.k + frame.x, y[t] * frame.k + frame.y, 0.15 + look.strength[e]);
  }
  shade(picture.data, raising, lowering, rgb(look.colours.positive), rgb(look.colours.negative));
  context.putImageData(picture, 0, 0);
  ctx.globalAlpha = 1;
  ctx.drawImage(canvas, 0, 0, frame.width, frame.height);
}

/** Adds a weight to every pixel of a line, as far as it lies in the picture. */
function addLine(sums, width, height, x0, y0, x1, y1, weight) {
  let from = 0;
  let to = 1;
  const dx = x1 - x0;
  const dy = y1 - y0;
  for (const [slope, start, size] of [[dx, x0, width - 1], [dy, y0, height - 1]]) {
    if (slope === 0) {
      if (start < 0 || start > size) return;
      continue;
    }
    const a = -start / slope;
    const b = (size - start) / slope;
    from = Math.max(from, Math.min(a, b));
    to = Math.min(to, Math.max(a, b));
  }
  if (from >= to) return;
  const steps = Math.max(1, Math.ceil(Math.max(Math.abs(dx), Math.abs(dy)) * (to - from)));
  const stepX = (dx * (to - from)) / steps;
  const stepY = (dy * (to - from)) / steps;
  let px = x0 + dx * from;
  let py = y0 + dy * from;
  for (let i = 0; i < steps; i++) {
    sums[(py | 0) * width + (px | 0)] += weight;
    px += stepX;
    py += stepY;
  }
}

function shade(data, raising, lowering, up, down) {
  let most = 0;
  for (let i = 0; i < raising.length; i++) most = Math.max(most, raising[i] + lowering[i]);
  const scale = most > 0 ? (255 * SHADE) / Math.log1p(most) : 0;
  for (let i = 0; i < raising.length; i++) {
    const sum = raising[i] + lowering[i];
    const at = 4 * i;
    if (!sum) {
      data[at + 3] = 0;
      continue;
    }
    const share = lowering[i] / sum;
    data[at] = up[0] + (down[0] - up[0]) * share;
    data[at + 1] = up[1] + (down[1] - up[1]) * share;
    data[at + 2] = up[2] + (down[2] - up[2]) * share;
    data[at + 3] = scale * Math.log1p(sum);
  }
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
