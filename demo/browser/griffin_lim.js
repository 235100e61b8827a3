import { RealFFT } from "./fft.js";

/**
 * Griffin-Lim with a bounded look-ahead: GriffinLimStream of streaming.py.
 *
 * Frames are settled in order. A frame gets its steps together with the `lookahead` frames after
 * it; settled frames do not change.
 */
export class GriffinLim {
  /** `recipe` is what build.py writes; `window` [n_fft] is that of the mel. */
  constructor(recipe, window) {
    const { n_fft, hop_size, lookahead } = recipe;
    Object.assign(this, { recipe, window, fft: new RealFFT(n_fft), settled: 0, pending: [] });
    this.tail = new Float64Array(n_fft - hop_size); // of settled frames, after the last settled hop
    this.wav = new Float64Array(n_fft + lookahead * hop_size);
    this.frame = new Float64Array(n_fft);
    this.re = new Float64Array(this.fft.bins);
    this.im = new Float64Array(this.fft.bins);
    this.normalisers = new Map();
    this.toSkip = (n_fft - hop_size) / 2; // samples before the first frame
    this.toReturn = 0;
  }

  /** Takes re, im and magnitude [bins] of the next frame; returns the samples that are final. */
  feed(re, im, magnitude) {
    const { softness, epsilon, lookahead, hop_size } = this.recipe;
    const frame = {
      re: new Float64Array(re),
      im: new Float64Array(im),
      magnitude: new Float64Array(magnitude),
    };
    frame.floor = frame.magnitude.map(x => softness * x * x + epsilon ** 2);
    this.withMagnitude(frame, frame.re, frame.im);
    frame.lastRe = frame.re.slice();
    frame.lastIm = frame.im.slice();
    this.pending.push(frame);
    this.toReturn += hop_size;
    return this.cut(this.pending.length > lookahead ? this.settle() : this.tail.subarray(0, 0));
  }

  /** Returns the samples that are left at the end of the mel. */
  flush() {
    const samples = [];
    while (this.pending.length) samples.push(...this.settle());
    samples.push(...multiply(this.tail.slice(), this.normaliser(0)));
    return this.cut(new Float64Array(samples));
  }

  /** Leaves out the samples before the first frame and after the last one. */
  cut(samples) {
    const skipped = Math.min(this.toSkip, samples.length);
    const rest = samples.subarray(skipped, skipped + this.toReturn);
    this.toSkip -= skipped;
    this.toReturn -= rest.length;
    return rest;
  }

  /** Settles the first pending frame; returns the hop of samples [hop_size] that it completes. */
  settle() {
    const { steps, lookahead, hop_size, n_fft } = this.recipe,
      { wav } = this;
    const frames = this.pending.slice(0, lookahead + 1),
      normaliser = this.normaliser(frames.length);
    for (let step = 0; step < steps; step++) {
      this.overlapAdd(frames);
      multiply(wav, normaliser);
      frames.forEach((frame, t) => this.extrapolate(frame, t * hop_size));
    }
    this.overlapAdd(frames.slice(0, 1));
    this.tail.set(wav.subarray(hop_size, n_fft));
    const samples = multiply(wav.slice(0, hop_size), this.normaliser(1));
    this.pending.shift();
    this.settled++;
    return samples;
  }

  /** Puts the spectrum at sample `first`, extrapolated by the momentum, into a frame. */
  extrapolate(frame, first) {
    const { re: phaseRe, im: phaseIm, lastRe, lastIm } = frame,
      { re, im } = this;
    const scale = 1 + this.recipe.momentum;
    this.frame.set(this.wav.subarray(first, first + this.frame.length));
    this.fft.forward(multiply(this.frame, this.window), re, im);
    for (let k = 0; k < re.length; k++) {
      phaseRe[k] = lastRe[k] + scale * (re[k] - lastRe[k]);
      phaseIm[k] = lastIm[k] + scale * (im[k] - lastIm[k]);
    }
    lastRe.set(re);
    lastIm.set(im);
  }

  /** Puts a frame's phase with its magnitude into `re` and `im`; weak bins stay weak. */
  withMagnitude(frame, re, im) {
    const { re: phaseRe, im: phaseIm, magnitude, floor } = frame,
      share = 1 - this.recipe.softness;
    for (let k = 0; k < re.length; k++) {
      const x = phaseRe[k],
        y = phaseIm[k];
      const gain = magnitude[k] / Math.sqrt(floor[k] + share * (x * x + y * y));
      re[k] = x * gain;
      im[k] = y * gain;
    }
  }

  /** Adds pending frames to the settled ones, in `wav`. */
  overlapAdd(frames) {
    const { wav, window, frame, re, im } = this;
    wav.fill(0).set(this.tail);
    for (let t = 0; t < frames.length; t++) {
      this.withMagnitude(frames[t], re, im);
      this.fft.inverse(re, im, frame);
      const first = t * this.recipe.hop_size;
      for (let i = 0; i < frame.length; i++) wav[first + i] += frame[i] * window[i];
    }
  }

  /** One over the sum of squared windows where `pending` frames follow the settled ones. */
  normaliser(pending) {
    const { n_fft, hop_size, min_window_sum } = this.recipe;
    const settled = Math.min(this.settled, n_fft / hop_size - 1),
      key = `${settled} ${pending}`;
    if (!this.normalisers.has(key)) {
      const sum = new Float64Array(Math.max(0, pending - 1) * hop_size + n_fft);
      for (let t = -settled; t < pending; t++)
        this.window.forEach((x, i) => {
          if (t * hop_size + i >= 0) sum[t * hop_size + i] += x * x;
        });
      this.normalisers.set(
        key,
        sum.map(x => 1 / Math.max(x, min_window_sum)),
      );
    }
    return this.normalisers.get(key);
  }
}

/** Multiplies x by the first values of y, or as many as there are, and returns it. */
function multiply(x, y) {
  const size = Math.min(x.length, y.length);
  for (let i = 0; i < size; i++) x[i] *= y[i];
  return x;
}
