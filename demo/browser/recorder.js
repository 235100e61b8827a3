const SETTINGS = { channelCount: 1, echoCancellation: false, noiseSuppression: false };

/** Records from the microphone. */
export class Recorder {
  get isRecording() {
    return this.recorder?.state === "recording";
  }

  /** Records until `stop`; calls `tick` with the seconds. Returns the bytes of an audio file. */
  async record(tick) {
    if (!navigator.mediaDevices) throw Error("no microphone; a page needs https to use one");
    const stream = await navigator.mediaDevices.getUserMedia({ audio: SETTINGS }).catch(error => {
      throw Error(`no microphone: ${error.message}`);
    });
    const pieces = [],
      begun = performance.now();
    const show = () => tick(Math.floor((performance.now() - begun) / 1000));
    this.recorder = new MediaRecorder(stream, { audioBitsPerSecond: 192_000 });
    this.recorder.ondataavailable = ({ data }) => pieces.push(data);
    const stopped = new Promise(resolve => {
      this.recorder.onstop = resolve;
    });
    this.recorder.start();
    show();
    const timer = setInterval(show, 250);
    await stopped;
    clearInterval(timer);
    stream.getTracks().forEach(track => track.stop());
    return new Blob(pieces).arrayBuffer();
  }

  stop() {
    this.recorder.stop();
  }
}
