// A client of model_worker.v1 in a few lines, with nothing but Node: gRPC is HTTP/2 with five bytes before a message.
//
//   node node_client.mjs HOST:PORT API_KEY DOCUMENT_ID TEXT QUESTION
//
// Makes a collection, sends a document, waits until it is committed, asks, and prints what came as JSON.
import http2 from 'node:http2';

const [address, key, id, text, question] = process.argv.slice(2);
const SERVICE = '/model_worker.v1.ModelWorker/';

// --- Protobuf: a message is a list of (field number, wire type, value) ------------------------------------------------

const varint = (value) => {
  const bytes = [];
  for (let rest = BigInt(value); ; rest >>= 7n) {
    if (rest < 128n) return Buffer.from([...bytes, Number(rest)]);
    bytes.push(Number(rest & 127n) | 128);
  }
};
const int = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);
const bytes = (field, value) => {
  const raw = Buffer.isBuffer(value) ? value : Buffer.from(value, 'utf8');
  return Buffer.concat([varint((field << 3) | 2), varint(raw.length), raw]);
};
const message = (...fields) => Buffer.concat(fields);

// All fields of a message: Map of number to a list of numbers, doubles or buffers.
function read(raw) {
  const fields = new Map();
  let at = 0;
  const number = () => {
    for (let value = 0n, shift = 0n; ; shift += 7n) {
      const byte = raw[at++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return Number(value);
    }
  };
  while (at < raw.length) {
    const tag = number();
    let value;
    if ((tag & 7) === 0) value = number();
    else if ((tag & 7) === 1) { value = raw.readDoubleLE(at); at += 8; }
    else { const length = number(); value = raw.subarray(at, at + length); at += length; }
    const list = fields.get(tag >> 3) ?? [];
    fields.set(tag >> 3, [...list, value]);
  }
  return fields;
}
const first = (fields, number, otherwise) => fields.get(number)?.[0] ?? otherwise;

// --- gRPC -------------------------------------------------------------------------------------------------------------

const session = http2.connect(`http://${address}`);

// Calls an rpc; `onMessage` gets every answer as it comes. Rejects with the call's status.
function call(rpc, messages, onMessage, bearer = key) {
  return new Promise((resolve, reject) => {
    const stream = session.request({
      ':method': 'POST',
      ':path': SERVICE + rpc,
      'content-type': 'application/grpc',
      te: 'trailers',
      authorization: `Bearer ${bearer}`,
      'grpc-timeout': '30S',
    });
    let waiting = Buffer.alloc(0);
    let status = {};
    const take = (headers) => {
      if (headers['grpc-status'] !== undefined) {
        status = { status: Number(headers['grpc-status']), message: decodeURIComponent(headers['grpc-message'] ?? '') };
      }
    };
    stream.on('response', take);
    stream.on('trailers', take);
    stream.on('data', (chunk) => {
      waiting = Buffer.concat([waiting, chunk]);
      while (waiting.length >= 5 && waiting.length >= 5 + waiting.readUInt32BE(1)) {
        const length = waiting.readUInt32BE(1);
        onMessage(read(waiting.subarray(5, 5 + length)));
        waiting = waiting.subarray(5 + length);
      }
    });
    stream.on('error', reject);
    stream.on('close', () => (status.status === 0 ? resolve() : reject(status)));
    for (const one of messages) {
      const head = Buffer.alloc(5);
      head.writeUInt32BE(one.length, 1);
      stream.write(Buffer.concat([head, one]));
    }
    stream.end();
  });
}

// --- Documents in, an answer out --------------------------------------------------------------------------------------

const told = { pieces: [] };
await call('CreateCollection', [message(bytes(1, 'node'))], () => {});

const half = Math.floor(text.length / 2);
const parts = [
  message(bytes(1, 'node'), bytes(2, id), bytes(3, text.slice(0, half)), int(5, 1)),  // More follows.
  message(bytes(2, id), bytes(3, text.slice(half))),
];
await call('PutDocuments', parts, (answer) => { told.added = first(answer, 1, 0); });

const options = message(int(1, 5));  // max_new_tokens
const look = message(bytes(1, 'node'), int(4, 32));  // collection, top_k
await call('Generate', [message(bytes(2, question), bytes(3, options), bytes(4, look))], (answer) => {
  const piece = first(answer, 1);
  if (piece !== undefined) { told.pieces.push(piece.toString('utf8')); return; }
  const finished = read(first(answer, 2));
  const sources = read(first(finished, 5));
  told.finished = {
    completion_tokens: first(finished, 4, 0),
    documents: (sources.get(1) ?? []).map(read).map((one) => ({
      id: first(one, 1).toString('utf8'),
      share: first(one, 2, 0),
    })),
  };
});

await call('GetModel', [message()], () => {}, 'fot_unknown').catch((status) => { told.refused = status; });

session.close();
console.log(JSON.stringify(told));
