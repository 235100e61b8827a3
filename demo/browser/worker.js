/**
 * Runs the vocoder beside the page. Messages to the worker: {load, runtime} with an entry of
 * models.json, {wav} or {mel, frames}; a new one ends the work on the last one. Messages from it:
 * {ready, threads}, then for each piece {samples, original, copy} (samples, and the frames of both
 * mels that are new), {done, seconds}, or {error}. Each has the `id` of the message it answers.
 */
import { Vocoder } from "./vocoder.js";

const WARM_UP_FRAMES = 96;
const noSeconds = () => ({ mel: 0, network: 0, griffinLim: 0 });

let ort, vocoder, current;

onmessage = async ({ data }) => {
  current = data.id;
  try {
    if (data.load) await load(data);
    else await vocode(data);
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
};

async function load({ id, load, runtime }) {
  ort ??= await import(new URL(`${runtime}/ort.wasm.min.mjs`, import.meta.url));
  vocoder?.session.release();
  vocoder = await Vocoder.load(ort, load, import.meta.url);
  await warmUp();
  postMessage({ id, ready: true, threads: ort.env.wasm.numThreads });
}

/** Vocodes silence, so that the browser compiles the hot parts before they are needed. */
async function warmUp() {
  const { mel } = vocoder,
    silence = new Float32Array(WARM_UP_FRAMES * mel.hop);
  const framesOf = (first, stop) => mel.compute(silence, first, stop);
  for await (const _ of vocoder.stream(framesOf, WARM_UP_FRAMES, noSeconds()));
}

async function vocode({ id, wav, mel, frames }) {
  const begun = performance.now(),
    { mel: logMel } = vocoder,
    { numMels } = logMel;
  const total = frames ?? logMel.frames(wav.length),
    copy = new Copy(logMel, total);
  const seconds = noSeconds();
  let known = [];
  const framesOf = (first, stop) =>
    (known = mel
      ? mel.subarray(first * numMels, stop * numMels)
      : logMel.compute(wav, first, stop));
  for await (const samples of vocoder.stream(framesOf, total, seconds)) {
    postMessage({ id, samples, original: known, copy: copy.add(samples) });
    known = [];
    await messages();
    if (id !== current) return;
  }
  seconds.total = (performance.now() - begun) / 1000;
  postMessage({ id, done: true, seconds });
}

/** The waveform so far and its mel. */
class Copy {
  constructor(logMel, total) {
    this.logMel = logMel;
    this.total = total;
    this.wav = new Float32Array(total * logMel.hop);
    this.size = this.frames = 0;
  }

  /** Adds samples; returns the frames of the mel that are complete with them. */
  add(samples) {
    this.wav.set(samples, this.size);
    this.size += samples.length;
    const { hop, margin } = this.logMel,
      first = this.frames;
    const isWhole = this.size === this.wav.length;
    this.frames = isWhole ? this.total : Math.max(first, Math.floor((this.size - margin) / hop));
    return this.logMel.compute(this.wav, first, this.frames);
  }
}

/** Lets the messages in that have arrived. */
const channel = new MessageChannel();
const messages = () =>
  new Promise(resolve => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
