/** The page: where sound comes from, what is shown, and what is played. worker.js vocodes. */
import { parseMel } from "./npy.js";
import { Player } from "./player.js";
import { Recorder } from "./recorder.js";
import { Spectrogram } from "./spectrogram.js";
import { encodeWav } from "./wav.js";

const TRACKS = ["original", "copy"];
const PARTS = { mel: "mel", network: "network", griffinLim: "Griffin-Lim", rest: "rest" };

const element = id => document.getElementById(id);
const { runtime, bytes: runtimeBytes, models } = await (await fetch("models.json")).json();
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const { sampling_rate: rate, num_mels: numMels, hop_size: hop } = Object.values(models)[0].mel;
const player = new Player(rate);
const pictures = Object.fromEntries(
  TRACKS.map(name => [name, new Spectrogram(element(name), numMels)]),
);
const sliders = Object.fromEntries(TRACKS.map(name => [name, element(name).nextElementSibling]));
const buttons = Object.fromEntries(TRACKS.map(name => [name, element(`play-${name}`)]));
const controls = [element("example"), element("record"), element("file")];

let job = 0; // the id of the last message to the worker; answers to others come too late
let source; // {name, wav} or {name, mel}, what is vocoded
let begun; // when the user asked for it, or null if its first sound has been heard

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

const fail = error => say(error.message, true);

// ------------------------------------------------------------------------------------------ model

const megabytes = bytes => `${(bytes / 1e6).toFixed(1)} MB`;

for (const [name, { bytes, note }] of Object.entries(models)) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), {
    type: "radio",
    name: "model",
    value: name,
  });
  input.checked = !element("models").childElementCount;
  input.onchange = () => loadModel(name);
  label.append(
    input,
    name,
    Object.assign(document.createElement("small"), { textContent: `${note}, ${megabytes(bytes)}` }),
  );
  element("models").append(label);
}

function loadModel(name) {
  const { bytes } = models[name];
  say(`Loading the vocoder, ${megabytes(runtimeBytes + bytes)}`);
  player.pause();
  controls.forEach(control => {
    control.disabled = true;
  });
  element("size").textContent = megabytes(bytes);
  element("kind").textContent = name;
  send({ load: models[name], runtime });
}

function send(message, transfer = []) {
  worker.postMessage({ id: ++job, ...message }, transfer);
}

// ----------------------------------------------------------------------------------------- source

/** Reads a source with `read`, an async function, and vocodes it. */
async function open(read) {
  const clicked = performance.now();
  player.context.resume();
  player.pause();
  try {
    source = await read();
    begun = clicked;
    vocode();
  } catch (error) {
    fail(error);
  }
}

async function readFile(file) {
  const { name } = file,
    bytes = await file.arrayBuffer();
  try {
    return name.endsWith(".npy")
      ? { name, mel: parseMel(bytes, numMels) }
      : await decode(name, bytes);
  } catch (error) {
    throw Error(`${name}: ${error.message}`);
  }
}

/** Returns the samples of an audio file, at the vocoder's rate and mixed to one channel. */
async function decode(name, bytes) {
  const decoding = new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  const audio = await decoding.catch(() => {
    throw Error("cannot be decoded; expected audio that this browser plays, or a mel as .npy");
  });
  if (audio.length < hop) throw Error(`${audio.length} samples; expected at least ${hop}`);
  const wav = new Float32Array(audio.length);
  for (let c = 0; c < audio.numberOfChannels; c++)
    audio.getChannelData(c).forEach((x, i) => {
      wav[i] += x / audio.numberOfChannels;
    });
  return { name, wav };
}

element("example").onclick = () =>
  open(async () => {
    const response = await fetch("clip.flac");
    if (!response.ok) throw Error(`clip.flac: the server answers ${response.status}`);
    return decode("The example", await response.arrayBuffer());
  });

element("file").onchange = ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be chosen again
  if (file) open(() => readFile(file));
};

const recorder = new Recorder();
element("record").onclick = async ({ target }) => {
  if (recorder.isRecording) return recorder.stop();
  player.context.resume();
  player.pause();
  try {
    const bytes = await recorder.record(seconds => {
      target.textContent = `Stop (${seconds} s)`;
      say("Recording");
    });
    open(() => decode("The recording", bytes));
  } catch (error) {
    fail(error);
  }
  target.textContent = "Record";
};

document.ondragover = event => {
  event.preventDefault();
  document.body.classList.add("over");
};
document.ondragleave = ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("over");
};
document.ondrop = event => {
  event.preventDefault();
  document.body.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file && !element("file").disabled) open(() => readFile(file));
};

// ---------------------------------------------------------------------------------------- results

function vocode() {
  const { name, wav, mel } = source,
    frames = mel ? mel.length / numMels : Math.floor(wav.length / hop);
  const samples = frames * hop;
  element("kind-of-source").textContent = mel ? "Mel" : "Recording";
  player.load({
    original: wav && { samples: wav, size: wav.length },
    copy: { samples: new Float32Array(samples), size: 0 },
  });
  TRACKS.forEach(track => {
    pictures[track].clear(frames);
    sliders[track].max = samples / rate;
    sliders[track].disabled = buttons[track].disabled = !player.tracks[track];
  });
  element("download").hidden = true;
  for (const id of ["speed", "first"]) element(id).textContent = "–";
  element("bar").replaceChildren();
  element("times").replaceChildren();
  say(`${name}: vocoding`);
  send({ wav, mel, frames });
}

worker.onerror = () =>
  fail(Error("the vocoder does not start in this browser; expected a current one"));
worker.onmessage = async ({ data }) => {
  if (data.id !== job) return;
  if (data.error) fail(Error(data.error));
  else if (data.ready) ready(data);
  else if (data.done) finish(data.seconds);
  else {
    pictures.original.add(data.original);
    pictures.copy.add(data.copy);
    player.extend("copy", data.samples);
    if (begun !== null && player.tracks.copy.size) startPlaying();
  }
};

function ready({ threads }) {
  controls.forEach(control => {
    control.disabled = false;
  });
  element("threads").textContent = threads > 1 ? `, ${threads} threads` : ", one thread";
  say("Ready");
  if (!source) return;
  begun = performance.now();
  vocode();
}

/** Plays the copy, unless the browser waits for a click before it plays sound. */
function startPlaying() {
  const clicked = begun;
  begun = null;
  if (player.context.state !== "running") return;
  const delay = 1000 * player.play("copy");
  element("first").textContent = `${Math.round(performance.now() - clicked + delay)} ms`;
}

function finish(seconds) {
  const { samples } = player.tracks.copy,
    length = samples.length / rate;
  seconds.rest = seconds.total - seconds.mel - seconds.network - seconds.griffinLim;
  element("speed").textContent = `${(length / seconds.total).toFixed(1)}×`;
  Object.entries(PARTS).forEach(([part, name], i) => {
    const swatch = Object.assign(document.createElement("i"), {
      style: `background: var(--part-${i + 1})`,
    });
    const bar = swatch.cloneNode(),
      item = document.createElement("li");
    bar.style.flexGrow = seconds[part];
    element("bar").append(bar);
    item.append(swatch, `${name} ${Math.round(1000 * seconds[part])} ms`);
    element("times").append(item);
  });
  const url = URL.createObjectURL(encodeWav(samples, rate));
  URL.revokeObjectURL(element("download").href);
  Object.assign(element("download"), { href: url, download: "copy.wav", hidden: false });
  say(`${source.name}: ${length.toFixed(1)} s vocoded in ${seconds.total.toFixed(2)} s`);
}

// --------------------------------------------------------------------------------------- playback

for (const track of TRACKS) {
  buttons[track].onclick = async () => {
    if (player.playing === track) return player.pause();
    await player.context.resume();
    player.play(track);
  };
  sliders[track].oninput = ({ target }) => player.seek(Number(target.value));
}

function showPosition() {
  if (player.isOver) player.rewind();
  for (const track of TRACKS) {
    sliders[track].value = player.position;
    buttons[track].setAttribute("aria-pressed", player.playing === track);
  }
  requestAnimationFrame(showPosition);
}

showPosition();
loadModel(Object.keys(models)[0]);
