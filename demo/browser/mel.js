import { RealFFT } from "./fft.js";

/** The log-mel spectrogram of meldataset.py. `recipe` is what build.py writes. */
export class LogMel {
  constructor(recipe) {
    Object.assign(this, { recipe, hop: recipe.hop_size, numMels: recipe.num_mels });
    this.window = hann(recipe.win_size, recipe.n_fft);
    this.margin = (recipe.n_fft - recipe.hop_size) / 2; // samples before the first frame
    this.fft = new RealFFT(recipe.n_fft);
    this.frame = new Float64Array(recipe.n_fft);
    this.re = new Float64Array(this.fft.bins);
    this.im = new Float64Array(this.fft.bins);
  }

  /** The number of frames of so many samples. */
  frames(samples) {
    return Math.floor(samples / this.hop);
  }

  /** Frames `first` to `stop` of the mel of wav [N]: [stop - first, num_mels], frame by frame. */
  compute(wav, first, stop) {
    const { recipe, fft, frame, re, im, numMels, window, margin } = this;
    const mel = new Float32Array((stop - first) * numMels);
    const last = Math.max(wav.length, margin + 1) - 1; // a shorter waveform ends in silence
    for (let t = first; t < stop; t++) {
      for (let i = 0; i < frame.length; i++) {
        let at = Math.abs(t * this.hop + i - margin); // reflected at both ends
        if (at > last) at = 2 * last - at;
        frame[i] = (wav[at] ?? 0) * window[i];
      }
      fft.forward(frame, re, im);
      for (let k = 0; k < re.length; k++)
        re[k] = Math.sqrt(re[k] * re[k] + im[k] * im[k] + recipe.stft_epsilon);
      recipe.bands.forEach(([begin, weights], band) => {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * re[begin + i];
        mel[(t - first) * numMels + band] = Math.log(Math.max(sum, recipe.mel_floor));
      });
    }
    return mel;
  }
}

/** A Hann window [size] with zeros around it [total]. */
function hann(size, total) {
  const window = new Float64Array(total),
    first = (total - size) / 2;
  for (let i = 0; i < size; i++) window[first + i] = (1 - Math.cos((2 * Math.PI * i) / size)) / 2;
  return window;
}
