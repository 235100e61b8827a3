const QUIET = -11.5,
  LOUD = 2; // log magnitudes at the ends of the colours
const MAX_COLUMNS = 2048;

/** Draws a mel that arrives in pieces. The canvas's CSS stretches it. */
export class Spectrogram {
  constructor(canvas, numMels) {
    Object.assign(this, { canvas, numMels });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    this.clear(1);
  }

  /** Begins a mel of so many frames. */
  clear(total) {
    this.total = total;
    this.columns = Math.min(total, MAX_COLUMNS);
    this.frames = 0;
    this.values = new Float32Array(this.columns * this.numMels).fill(-Infinity);
    Object.assign(this.canvas, { width: this.columns, height: this.numMels });
    this.redraw();
  }

  /** Adds frames [n * num_mels]; those that share a column show their maximum. */
  add(mel) {
    const { numMels, values } = this,
      from = this.column(this.frames);
    for (let i = 0; i < mel.length; i++) {
      const at = this.column(this.frames + Math.floor(i / numMels)) * numMels + (i % numMels);
      values[at] = Math.max(values[at], mel[i]);
    }
    this.frames += mel.length / numMels;
    if (mel.length) this.draw(from, this.column(this.frames - 1) + 1);
  }

  column(frame) {
    return Math.floor((frame * this.columns) / this.total);
  }

  redraw() {
    this.colours = colours(getComputedStyle(this.canvas).getPropertyValue("--levels"));
    this.draw(0, this.columns);
  }

  /** Draws columns `from` to `to`; low bands are at the bottom. */
  draw(from, to) {
    const { numMels, values, colours } = this,
      context = this.canvas.getContext("2d");
    const image = context.createImageData(to - from, numMels);
    for (let x = from; x < to; x++)
      for (let band = 0; band < numMels; band++) {
        const value = values[x * numMels + band];
        if (value === -Infinity) continue; // transparent
        const level = Math.max(
          0,
          Math.min(255, Math.round((255 * (value - QUIET)) / (LOUD - QUIET))),
        );
        const at = 4 * ((numMels - 1 - band) * (to - from) + x - from);
        image.data.set(colours.subarray(4 * level, 4 * level + 4), at);
      }
    context.putImageData(image, from, 0);
  }
}

/** 256 colours, RGBA, between equally spaced ones, "#rrggbb #rrggbb ...". */
function colours(text) {
  const stops = text
    .trim()
    .split(/\s+/)
    .map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
  const table = new Uint8ClampedArray(4 * 256);
  for (let level = 0; level < 256; level++) {
    const place = (level / 255) * (stops.length - 1),
      low = Math.min(Math.floor(place), stops.length - 2);
    const mixed = stops[low].map((x, i) => x + (place - low) * (stops[low + 1][i] - x));
    table.set([...mixed, 255], 4 * level);
  }
  return table;
}
