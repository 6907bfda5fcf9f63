// A stand-in for a canvas's context that writes SVG, so that the exported figure is the drawing itself.

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "");
const n = (value) => Number(value.toFixed(2));

export class SvgContext {
  constructor(width, height) {
    Object.assign(this, { width, height, isVector: true, parts: [], path: [], globalAlpha: 1, lineWidth: 1, fillStyle: "#000", strokeStyle: "#000" });
    Object.assign(this, { font: "12px sans-serif", textAlign: "left", textBaseline: "alphabetic", lineJoin: "miter" });
    this.ruler = document.createElement("canvas").getContext("2d");
  }

  beginPath() { this.path = []; }
  moveTo(x, y) { this.path.push(`M${n(x)} ${n(y)}`); }
  lineTo(x, y) { this.path.push(`L${n(x)} ${n(y)}`); }
  bezierCurveTo(a, b, c, d, x, y) { this.path.push(`C${n(a)} ${n(b)} ${n(c)} ${n(d)} ${n(x)} ${n(y)}`); }
  closePath() { this.path.push("Z"); }
  arc(x, y, r) { this.path.push(`A${n(r)} ${n(r)} 0 1 1 ${n(x - r)} ${n(y)}A${n(r)} ${n(r)} 0 1 1 ${n(x + r)} ${n(y)}Z`); }

  stroke() {
    if (!this.path.length) return;
    this.parts.push(`<path d="${this.path.join("")}" fill="none" stroke="${this.strokeStyle}" stroke-width="${n(this.lineWidth)}"${this.opacity()}/>`);
  }

  fill() {
    if (this.path.length) this.parts.push(`<path d="${this.path.join("")}" fill="${this.fillStyle}"${this.opacity()}/>`);
  }

  fillRect(x, y, w, height) {
    this.parts.push(`<rect x="${n(x)}" y="${n(y)}" width="${n(Math.max(0, w))}" height="${n(Math.max(0, height))}" fill="${this.fillStyle}"${this.opacity()}/>`);
  }

  drawImage(image, ...place) {
    const [x, y, w, height] = place.slice(-4);
    if (!image.src || place.length > 4) return;
    this.parts.push(`<image href="${escape(image.src)}" x="${n(x)}" y="${n(y)}" width="${n(w)}" height="${n(height)}" preserveAspectRatio="none" style="image-rendering:pixelated"/>`);
  }

  measureText(text) {
    this.ruler.font = this.font;
    return this.ruler.measureText(text);
  }

  opacity() { return this.globalAlpha < 1 ? ` opacity="${n(this.globalAlpha)}"` : ""; }

  text(text, x, y, paint) {
    const [, slant, weight, size] = this.font.match(/^(italic )?(?:(\d+) )?([\d.]+)px/) ?? ["", "", "", "12"];
    const anchor = { left: "start", right: "end", center: "middle" }[this.textAlign];
    const base = this.textBaseline === "middle" ? ' dominant-baseline="central"' : "";
    const family = escape(this.font.replace(/^.*?px /, ""));
    this.parts.push(`<text x="${n(x)}" y="${n(y)}" font-family="${family}" font-size="${size}"${weight ? ` font-weight="${weight}"` : ""}${slant ? ' font-style="italic"' : ""} text-anchor="${anchor}"${base} ${paint}>${escape(text)}</text>`);
  }

  fillText(text, x, y) { this.text(text, x, y, `fill="${this.fillStyle}"`); }

  strokeText(text, x, y) {
    this.text(text, x, y, `fill="none" stroke="${this.strokeStyle}" stroke-width="${n(this.lineWidth)}" stroke-linejoin="round"`);
  }

  toString() {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" viewBox="0 0 ${this.width} ${this.height}">\n${this.parts.join("\n")}\n</svg>\n`;
  }
}
