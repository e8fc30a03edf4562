// A client in another language, written from docs/protocol.md alone: it joins a run, checks every seal, and is then as
// rude as it can. It ends with exit code 0 if each refusal has the reason that the document promises.
import assert from 'node:assert/strict'
import { createHash, createPublicKey, generateKeyPairSync, randomBytes, randomInt, sign, verify } from 'node:crypto'

const url = process.argv[2]
if (!url) throw new Error('usage: node client.mjs http://HOST:PORT')
const sha256 = (bytes) => createHash('sha256').update(bytes).digest()
const base64 = (bytes) => Buffer.from(bytes).toString('base64')
const bytesOf = (text) => Buffer.from(text, 'base64')
const now = () => Math.floor(Date.now() / 1000)

// ---- as much msgpack as sealed documents (unpack) and the name of a submission (pack) need
function unpack(bytes) {
  let at = 0
  const take = (count) => bytes.subarray(at, (at += count))
  const uint = (count) => take(count).readUIntBE(0, count)
  const list = (count) => Array.from({ length: count }, item)
  const map = (count) => Object.fromEntries(Array.from({ length: count }, () => [item(), item()]))
  function item() {
    const tag = uint(1)
    if (tag < 0x80) return tag
    if (tag < 0x90) return map(tag & 15)
    if (tag < 0xa0) return list(tag & 15)
    if (tag < 0xc0) return take(tag & 31).toString()
    if (tag === 0xc0 || tag === 0xc2 || tag === 0xc3) return { 0xc0: null, 0xc2: false, 0xc3: true }[tag]
    if (tag >= 0xc4 && tag <= 0xc6) return take(uint(1 << (tag - 0xc4))) // bytes
    if (tag === 0xcb) return take(8).readDoubleBE()
    if (tag >= 0xcc && tag <= 0xce) return uint(1 << (tag - 0xcc))
    if (tag === 0xcf) return take(8).readBigUInt64BE() // seeds: a Number would lose bits
    if (tag >= 0xd9 && tag <= 0xdb) return take(uint(1 << (tag - 0xd9))).toString()
    if (tag === 0xdc || tag === 0xdd) return list(uint(tag === 0xdc ? 2 : 4))
    if (tag === 0xde || tag === 0xdf) return map(uint(tag === 0xde ? 2 : 4))
    throw new Error(`msgpack tag ${tag}`)
  }
  const value = item()
  assert.equal(at, bytes.length, 'bytes after the document')
  return value
}
function head(length, short, most, wide) { // each length in its shortest form; `wide` are the tags for 1, 2 and 4 bytes
  if (length <= most) return Buffer.from([short | length])
  const index = wide.findIndex((tag, i) => tag && length < 256 ** (1 << i))
  const out = Buffer.alloc(1 + (1 << index), wide[index])
  out.writeUIntBE(length, 1, 1 << index)
  return out
}
function pack(value) {
  if (Buffer.isBuffer(value)) return Buffer.concat([head(value.length, 0, -1, [0xc4, 0xc5, 0xc6]), value])
  const text = typeof value === 'string' && Buffer.from(value)
  if (text) return Buffer.concat([head(text.length, 0xa0, 31, [0xd9, 0xda, 0xdb]), text])
  const isList = Array.isArray(value)
  const items = isList ? value : Object.entries(value).flat()
  const [count, short, wide] = isList ? [items.length, 0x90, 0xdc] : [items.length / 2, 0x80, 0xde]
  return Buffer.concat([head(count, short, 15, [0, wide, wide + 1]), ...items.map(pack)])
}

// ---- keys, signed requests, sealed documents
function nodeId(raw) {
  const digits = BigInt('0x' + sha256(raw).toString('hex', 0, 10)).toString(32).padStart(16, '0')
  return 'n' + digits.replace(/./g, (digit) => 'abcdefghijklmnopqrstuvwxyz234567'[parseInt(digit, 32)])
}
function newNode() {
  const { privateKey, publicKey } = generateKeyPairSync('ed25519')
  const keyid = publicKey.export({ format: 'jwk' }).x // base64url of the raw key, without padding
  return { privateKey, keyid, id: nodeId(Buffer.from(keyid, 'base64url')) }
}
function signed(node, path, message, { created = now(), tag = index.coordinator } = {}) {
  const body = Buffer.isBuffer(message) ? message : Buffer.from(JSON.stringify(message))
  const digest = `sha-256=:${base64(sha256(body))}:`
  const parameters = `("@method" "@path" "@query" "content-digest");created=${created};` +
    `nonce="${randomBytes(16).toString('base64url')}";alg="ed25519";keyid="${node.keyid}";tag="${tag}"`
  const request = `"@method": POST\n"@path": ${path}\n"@query": ?\n`
  const text = `${request}"content-digest": ${digest}\n"@signature-params": ${parameters}`
  const signature = `sig1=:${base64(sign(null, Buffer.from(text), node.privateKey))}:`
  const headers = { 'content-digest': digest, 'signature-input': `sig1=${parameters}`, signature }
  return { path, method: 'POST', headers: { 'content-type': 'application/json', ...headers }, body }
}
async function send({ path, ...request }) {
  const answer = await fetch(url + path, { ...request, signal: AbortSignal.timeout(40_000) })
  return answer.ok ? { message: await answer.json() } : { refusal: await answer.json() }
}
async function ask(request) {
  const { message, refusal } = await send(request)
  assert.ok(message, `${request.path}: ${refusal?.code}: ${refusal?.detail}`)
  return message
}
function unseal(document, kind, publicKey) {
  assert.equal(document.kind, kind)
  assert.deepEqual(bytesOf(document.public), publicKey, `the ${kind} is sealed by another key`)
  const jwk = { kty: 'OKP', crv: 'Ed25519', x: publicKey.toString('base64url') }
  const payload = bytesOf(document.payload)
  const text = Buffer.concat([Buffer.from(`farflung\0${kind}\0`), payload])
  const isGood = verify(null, text, createPublicKey({ key: jwk, format: 'jwk' }), bytesOf(document.signature))
  assert.ok(isGood, `the seal of the ${kind} does not verify`)
  return unpack(payload)
}

// ---- a worker's life, as far as it goes without a model
const index = await ask({ path: '/v1' })
const run = index.runs[0]
const papers = await ask({ path: `/v1/runs/${run}` })
assert.equal(papers.root, index.root) // whoever was told which root to trust compares it here
const keys = {}
for (const delegation of papers.delegations.map((sealed) => unseal(sealed, 'delegation', bytesOf(papers.root)))) {
  if (delegation.run === run && delegation.expires_at > now()) keys[delegation.purpose] = delegation.public
}
assert.ok(keys.coordinator && keys.weights)
const info = unseal(papers.info, 'run', keys.coordinator)
assert.deepEqual([info.run, info.coordinator], [run, nodeId(keys.coordinator)])
assert.equal(info.coordinator, index.coordinator)
console.log(`papers of ${run} are in order: coordinator ${info.coordinator}, vocabulary ${info.vocab}`)

async function join(name) {
  const node = newNode()
  const welcome = await ask(signed(node, '/v1/nodes', { version: index.version, name, engine: 'none' }))
  assert.equal(welcome.node, node.id)
  const beat = () => send(signed(node, `/v1/runs/${run}/heartbeat`, { phase: 'pretending' })).catch(() => {})
  setInterval(beat, info.heartbeat_s * 1000).unref() // without it the lease soon goes to others
  return node
}
async function lease(node) {
  for (;;) {
    const answer = await ask(signed(node, `/v1/runs/${run}/leases`, { slots: 4, wait_s: 5 }))
    if (answer.lease) return check(unseal(answer.lease, 'lease', keys.coordinator), node)
    await new Promise((resolve) => setTimeout(resolve, answer.retry_after_s * 1000))
  }
}
function check(work, node) {
  assert.deepEqual([work.node, work.run], [node.id, run])
  const decode = (ids) => Array.from({ length: ids.length / 4 }, (_, i) => ids.readUInt32LE(4 * i))
  const prompts = work.groups.map((group) => decode(group.prompt_ids))
  assert.ok(prompts.flat().every((id) => id < info.vocab))
  const path = `/v1/runs/${run}/leases/${work.lease}`
  return { ...work, prompts, path, samples: work.groups.flatMap((group) => group.samples) }
}
const us = await join('js')
const them = await join('js-too')
const [ours, theirs] = [await lease(us), await lease(them)]
console.log(`lease ${ours.lease}: ${ours.samples.length} samples, budget ${ours.budget}, a prompt ${ours.prompts[0]}`)

// ---- bad manners: what is done, and the status and code that docs/protocol.md has us expect
function encode(ids) {
  const out = Buffer.alloc(4 * ids.length)
  ids.forEach((id, i) => out.writeUInt32LE(id, 4 * i))
  return base64(out)
}
const inner = Array.from({ length: info.vocab }, (_, id) => id).filter((id) => !info.eos_ids.includes(id))
const tokens = (count) => Array.from({ length: count }, () => inner[randomInt(inner.length)]) // none of them an end
const body = (samples, make) => ({ rollouts: samples.map(({ rollout }) => ({ rollout, ids: encode(make()) })) })
const madeUp = () => tokens(ours.budget) // the longest there may be: needs no end
const submit = (make, samples = ours.samples) => signed(us, `${ours.path}/submission`, body(samples, make))
let surprises = 0
async function refused(what, status, code, request) {
  const { refusal } = await send(request)
  const isAsSaid = refusal?.status === status && refusal?.code === code
  surprises += isAsSaid ? 0 : 1
  console.log(`${isAsSaid ? 'ok   ' : 'WRONG'} ${what}: ${refusal?.status} ${refusal?.code}: ${refusal?.detail}`)
}
await refused('ends too early', 422, 'rejected', submit(() => tokens(ours.budget - 1)))
await refused('never ends', 422, 'rejected', submit(() => tokens(ours.budget + 1)))
await refused('goes on after its end', 422, 'rejected', submit(() => [info.eos_ids[0], ...tokens(ours.budget - 1)]))
await refused('beyond the vocabulary', 422, 'rejected', submit(() => [info.vocab]))
await refused('one rollout is missing', 422, 'rejected', submit(madeUp, ours.samples.slice(1)))
const stolen = [theirs.samples[0], ...ours.samples.slice(1)]
await refused("somebody else's rollout", 422, 'rejected', submit(madeUp, stolen))
const intruding = signed(us, `${theirs.path}/submission`, body(theirs.samples, madeUp))
await refused("somebody else's lease", 403, 'forbidden', intruding)
const whole = submit(madeUp)
const cut = submit(madeUp)
const short = cut.body.subarray(0, -9)
await refused('truncated, then signed', 400, 'malformed', signed(us, cut.path, short))
await refused('signed, then truncated', 401, 'bad-signature', { ...cut, body: short })
const signature = `sig1=:${base64(randomBytes(64))}:`
await refused('a wrong signature', 401, 'bad-signature', { ...whole, headers: { ...whole.headers, signature } })
await refused('for another coordinator', 401, 'bad-signature', signed(us, whole.path, whole.body, { tag: us.id }))
await refused('signed long ago', 401, 'clock-skew', signed(us, whole.path, whole.body, { created: now() - 90 }))
await refused('a key nobody knows', 404, 'not-found', signed(newNode(), `/v1/runs/${run}/leases`, {}))
await refused('a role nobody granted', 403, 'forbidden', signed(us, `/v1/runs/${run}/scores/claim`, {}))

// ---- well-formed, but made up: sanity cannot tell, replay will
const sealed = await ask(whole)
const receipt = unseal(sealed, 'receipt', keys.coordinator)
const rollouts = JSON.parse(whole.body).rollouts.map(({ rollout, ids }) => ({ rollout, ids: bytesOf(ids) }))
assert.equal(receipt.submission, sha256(pack({ lease: ours.lease, node: us.id, rollouts })).toString('hex'))
assert.deepEqual(await ask(signed(us, whole.path, whole.body)), sealed, 'sent twice, another receipt')
console.log(`taken until a validator looks: ${receipt.tokens} tokens, submission ${receipt.submission}`)
await refused('the same request again', 401, 'replayed', whole)
await refused('other tokens for the same lease', 409, 'lease-gone', submit(madeUp))
await ask(signed(them, `${theirs.path}/return`, {}))
const late = signed(them, `${theirs.path}/submission`, body(theirs.samples, madeUp))
await refused('what was handed back', 409, 'lease-gone', late)
console.log(surprises ? `${surprises} answers are not as documented` : 'every refusal is as documented')
process.exitCode = surprises ? 1 : 0
