const TYPES = { "<f4": Float32Array, "<f8": Float64Array };

/** The bytes of a .npy file with a log-mel [num_mels, T] -> frames, Float32Array [T * num_mels]. */
export function parseMel(buffer, numMels) {
  const bytes = new Uint8Array(buffer),
    view = new DataView(buffer);
  if (bytes.length < 12 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY")
    throw Error("not a .npy file");
  const begin = bytes[6] > 1 ? 12 : 10;
  const end = begin + (bytes[6] > 1 ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder("latin1").decode(bytes.subarray(begin, end));
  const type = /'descr': '([^']*)'/.exec(header)?.[1],
    Values = TYPES[type];
  if (!Values) throw Error(`values of type ${type ?? "unknown"}; expected float32 or float64`);
  const T = framesOf(/'shape': \(([^)]*)\)/.exec(header)?.[1] ?? "", numMels);
  if (buffer.byteLength - end < T * numMels * Values.BYTES_PER_ELEMENT)
    throw Error("the file ends before its last value");
  const values = new Values(buffer.slice(end, end + T * numMels * Values.BYTES_PER_ELEMENT));
  if (!values.every(Number.isFinite)) throw Error("holds values that are NaN or infinite");
  if (header.includes("'fortran_order': True")) return Float32Array.from(values);
  return Float32Array.from(values, (_, i) => values[(i % numMels) * T + Math.floor(i / numMels)]);
}

/** The number of frames of a shape, as text. Raises an error unless it is [num_mels, T]. */
function framesOf(text, numMels) {
  const shape = text
    .split(",")
    .filter(x => x.trim())
    .map(Number);
  const [bands, T] = shape.length === 3 && shape[0] === 1 ? shape.slice(1) : shape;
  if (shape.length >= 2 && shape.length <= 3 && bands === numMels && T > 0) return T;
  const hint = T === numMels ? "; it looks transposed: swap its last two axes" : "";
  throw Error(`shape [${shape.join(", ")}]; expected [${numMels}, T] or [1, ${numMels}, T]${hint}`);
}
