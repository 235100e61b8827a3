/** The Fourier transform of n real samples, n a power of two, as a complex one of n / 2 points. */
export class RealFFT {
  constructor(n) {
    this.n = n;
    this.half = n / 2;
    this.bins = this.half + 1;
    // exp(-2 pi i k / n) for the real transform; every second one serves the complex transform.
    this.cos = Float64Array.from({ length: this.half }, (_, k) => Math.cos((2 * Math.PI * k) / n));
    this.sin = Float64Array.from({ length: this.half }, (_, k) => -Math.sin((2 * Math.PI * k) / n));
    this.reversed = new Uint32Array(this.half);
    for (let i = 1; i < this.half; i++)
      this.reversed[i] = (this.reversed[i >> 1] >> 1) | (i & 1 ? this.half >> 1 : 0);
    this.re = new Float64Array(this.half);
    this.im = new Float64Array(this.half);
  }

  /** x [n] -> re, im [n / 2 + 1]. */
  forward(x, re, im) {
    const { half, cos, sin, reversed } = this,
      [a, b] = [this.re, this.im];
    for (let i = 0; i < half; i++) {
      const j = reversed[i];
      a[i] = x[2 * j];
      b[i] = x[2 * j + 1];
    }
    this.transform();
    // With Z of x[2 i] + i x[2 i + 1]: the even samples give (Z[k] + Z*[-k]) / 2, the odd ones
    // (Z[k] - Z*[-k]) / 2i.
    for (let k = 0; k <= half / 2; k++) {
      const m = k === 0 ? 0 : half - k;
      const evenRe = (a[k] + a[m]) / 2,
        evenIm = (b[k] - b[m]) / 2;
      const oddRe = (b[k] + b[m]) / 2,
        oddIm = (a[m] - a[k]) / 2;
      const turnedRe = oddRe * cos[k] - oddIm * sin[k],
        turnedIm = oddRe * sin[k] + oddIm * cos[k];
      re[k] = evenRe + turnedRe;
      im[k] = evenIm + turnedIm;
      re[half - k] = evenRe - turnedRe;
      im[half - k] = turnedIm - evenIm;
    }
  }

  /** re, im [n / 2 + 1] -> x [n]. */
  inverse(re, im, x) {
    const { half, cos, sin, reversed } = this,
      [a, b] = [this.re, this.im];
    for (let k = 0; k < half; k++) {
      const m = half - k,
        j = reversed[k];
      // The parts at 0 and n / 2 are real, whatever im holds.
      const reK = re[k],
        imK = k === 0 ? 0 : im[k],
        reM = re[m],
        imM = k === 0 ? 0 : -im[m];
      const turnedRe = reK - reM,
        turnedIm = imK - imM;
      const oddRe = turnedRe * cos[k] + turnedIm * sin[k];
      const oddIm = turnedIm * cos[k] - turnedRe * sin[k];
      // The conjugate, since the inverse is the conjugate of the transform of the conjugate.
      a[j] = reK + reM - oddIm;
      b[j] = -(imK + imM + oddRe);
    }
    this.transform();
    const scale = 1 / this.n;
    for (let i = 0; i < half; i++) {
      x[2 * i] = a[i] * scale;
      x[2 * i + 1] = -b[i] * scale;
    }
  }

  /** Transforms re + i im, which are in bit-reversed order; two radix-2 stages at a time. */
  transform() {
    const { half, cos, sin, re, im } = this;
    let size = 1; // of the transforms that are done
    if (Math.log2(half) % 2) {
      for (let i = 0; i < half; i += 2) {
        const x = re[i + 1],
          y = im[i + 1];
        re[i + 1] = re[i] - x;
        im[i + 1] = im[i] - y;
        re[i] += x;
        im[i] += y;
      }
      size = 2;
    }
    for (; size < half; size *= 4) {
      const step = half / (2 * size); // of W(4 size, k) in the tables
      for (let k = 0; k < size; k++) {
        const c1 = cos[2 * k * step],
          s1 = sin[2 * k * step],
          c2 = cos[k * step],
          s2 = sin[k * step];
        const c3 = c1 * c2 - s1 * s2,
          s3 = c1 * s2 + s1 * c2;
        for (let i = k; i < half; i += 4 * size) {
          const j = i + size,
            l = j + size,
            m = l + size;
          const x0 = re[i],
            y0 = im[i];
          const x1 = re[j] * c1 - im[j] * s1,
            y1 = re[j] * s1 + im[j] * c1;
          const x2 = re[l] * c2 - im[l] * s2,
            y2 = re[l] * s2 + im[l] * c2;
          const x3 = re[m] * c3 - im[m] * s3,
            y3 = re[m] * s3 + im[m] * c3;
          const p0 = x0 + x1,
            q0 = y0 + y1,
            p1 = x0 - x1,
            q1 = y0 - y1;
          const p2 = x2 + x3,
            q2 = y2 + y3,
            p3 = y2 - y3,
            q3 = x3 - x2;
          re[i] = p0 + p2;
          im[i] = q0 + q2;
          re[j] = p1 + p3;
          im[j] = q1 + q3;
          re[l] = p0 - p2;
          im[l] = q0 - q2;
          re[m] = p1 - p3;
          im[m] = q1 - q3;
        }
      }
    }
  }
}
