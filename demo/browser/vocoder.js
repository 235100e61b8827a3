import { GriffinLim } from "./griffin_lim.js";
import { LogMel } from "./mel.js";

/** A generator: a graph from pieces of a mel to spectra, and Griffin-Lim. */
export class Vocoder {
  /** `ort` is ONNX Runtime; `about` is an entry of models.json, whose file lies beside `base`. */
  static async load(ort, about, base) {
    const response = await fetch(new URL(about.file, base));
    if (!response.ok) throw Error(`${about.file}: the server answers ${response.status}`);
    const session = await ort.InferenceSession.create(new Uint8Array(await response.arrayBuffer()));
    return new Vocoder(ort, session, about);
  }

  constructor(ort, session, about) {
    Object.assign(this, { ort, session, about, mel: new LogMel(about.mel) });
  }

  /**
   * Vocodes a mel piece by piece. `framesOf(first, stop)` returns frames [stop - first, num_mels]
   * of the mel; `total` is their number. Yields the samples that are final, [N]. Adds the seconds
   * that each part takes to `seconds`: mel, network, griffinLim.
   */
  async *stream(framesOf, total, seconds) {
    const griffinLim = new GriffinLim(this.about.griffin_lim, this.mel.window);
    for await (const spectra of this.spectra(framesOf, total, seconds)) {
      const begun = performance.now(),
        pieces = spectra.map(x => griffinLim.feed(...x));
      seconds.griffinLim += (performance.now() - begun) / 1000;
      yield concatenate(pieces);
    }
    yield Float32Array.from(griffinLim.flush());
  }

  /** Yields lists of re, im and magnitude [bins], one for each frame. */
  async *spectra(framesOf, total, seconds) {
    const { frames, delay, state } = this.about;
    let tensors = Object.fromEntries(
      Object.entries(state).map(([name, x]) => [name, this.zeros(x)]),
    );
    for (let first = 0; first - delay < total; first += frames) {
      const stop = Math.min(first + frames, total),
        begun = performance.now();
      const mel = this.piece(first < stop ? framesOf(first, stop) : []);
      const between = performance.now();
      if (first + frames >= total)
        tensors.length = new this.ort.Tensor("int64", BigInt64Array.of(BigInt(total)), [1]);
      const outputs = await this.session.run({ mel, ...tensors });
      seconds.mel += (between - begun) / 1000;
      seconds.network += (performance.now() - between) / 1000;
      tensors = Object.fromEntries(Object.keys(state).map(name => [name, outputs[`next.${name}`]]));
      const valid = [...Array(frames).keys()].filter(
        i => first - delay + i >= 0 && first - delay + i < total,
      );
      yield valid.map(i => this.frame(outputs.spectra.data, i));
    }
  }

  /** The tensor [1, num_mels, frames] of mel frames [n, num_mels], n at most `frames`. */
  piece(mel) {
    const { frames } = this.about,
      { numMels } = this.mel;
    const values = new Float32Array(numMels * frames);
    for (let i = 0; i < mel.length; i++)
      values[(i % numMels) * frames + Math.floor(i / numMels)] = mel[i];
    return new this.ort.Tensor("float32", values, [1, numMels, frames]);
  }

  /** Real part, imaginary part and magnitude of frame i of spectra [frames, 3, bins]. */
  frame(spectra, i) {
    const bins = this.about.mel.n_fft / 2 + 1;
    return [0, 1, 2].map(part =>
      spectra.subarray((3 * i + part) * bins, (3 * i + part + 1) * bins),
    );
  }

  zeros({ shape, type }) {
    const Values = { float32: Float32Array, float64: Float64Array, int64: BigInt64Array }[type];
    return new this.ort.Tensor(type, new Values(shape.reduce((x, y) => x * y, 1)), shape);
  }
}

/** Pieces [N] one after the other, as Float32Array. */
function concatenate(pieces) {
  const whole = new Float32Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let size = 0;
  for (const piece of pieces) {
    whole.set(piece, size);
    size += piece.length;
  }
  return whole;
}
