const LEAD = 0.02; // seconds from a decision to play to the first sample

/** Plays one of several tracks, of which some still grow. */
export class Player {
  constructor(rate) {
    this.context = new AudioContext({ sampleRate: rate });
    this.tracks = {}; // name -> {samples [N], size}: the first `size` samples are there
    this.sources = [];
    this.playing = null; // the name of a track
    this.start = 0; // of the track, in the context's time
    this.at = 0; // seconds, where a paused track continues
  }

  /** Replaces all tracks. */
  load(tracks) {
    this.rewind();
    this.tracks = tracks;
  }

  /** Adds samples to a track. */
  extend(name, samples) {
    const track = this.tracks[name];
    track.samples.set(samples, track.size);
    track.size += samples.length;
    if (this.playing === name) this.schedule();
  }

  /** Plays a track from the position of the last one. Returns the seconds until it sounds. */
  play(name) {
    this.pause();
    const { context } = this;
    this.playing = name;
    this.scheduled = Math.round(this.at * context.sampleRate);
    this.start = context.currentTime + LEAD - this.at;
    this.schedule();
    return LEAD + (context.outputLatency || context.baseLatency || 0);
  }

  /** Schedules the samples that are there and not scheduled yet. */
  schedule() {
    const { context, scheduled } = this,
      { samples, size } = this.tracks[this.playing];
    if (size <= scheduled) return;
    const late = context.currentTime - (this.start + scheduled / context.sampleRate);
    if (late > 0) this.start += late + LEAD;
    const buffer = context.createBuffer(1, size - scheduled, context.sampleRate);
    buffer.copyToChannel(samples.subarray(scheduled, size), 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(context.destination);
    source.start(this.start + scheduled / context.sampleRate);
    this.sources.push(source);
    this.scheduled = size;
  }

  pause() {
    this.at = this.position;
    this.playing = null;
    this.sources.forEach(source => source.stop());
    this.sources = [];
  }

  /** Stops, and will start from the beginning. */
  rewind() {
    this.pause();
    this.at = 0;
  }

  /** Continues, or will continue, so many seconds from the start. */
  seek(seconds) {
    const { playing } = this;
    this.pause();
    this.at = seconds;
    if (playing) this.play(playing);
  }

  /** Seconds from the start. */
  get position() {
    if (!this.playing) return this.at;
    const { context } = this,
      end = this.scheduled / context.sampleRate;
    return Math.max(0, Math.min(end, context.currentTime - this.start));
  }

  /** Whether the playing track has come to its end. */
  get isOver() {
    const { samples } = this.tracks[this.playing] ?? { samples: [] };
    return this.playing !== null && this.position >= samples.length / this.context.sampleRate;
  }
}
