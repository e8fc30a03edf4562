// A client in another language, written from docs/protocol.md alone: it joins a run, checks every seal, and is then as
// rude as it can. It ends with exit code 0 if each refusal has the reason that the document promises.
import assert from 'node:assert/strict'
import { createHash, generateKeyPairSync, randomBytes, randomInt, sign, verify } from 'node:crypto'
import { unpack } from './msgpack.mjs'

const url = process.argv[2] ?? assert.fail('usage: node client.mjs http://HOST:PORT')
const sha256 = (bytes) => createHash('sha256').update(bytes).digest()
const bytesOf = (text) => Buffer.from(text, 'base64')
const now = () => Math.floor(Date.now() / 1000)

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
function signed(node, path, message, created = now()) {
  const body = Buffer.isBuffer(message) ? message : Buffer.from(JSON.stringify(message))
  const sum = `sha-256=:${sha256(body).toString('base64')}:`
  const input = `("@method" "@path" "@query" "content-digest");created=${created};` +
    `nonce="${randomBytes(16).toString('base64url')}";alg="ed25519";keyid="${node.keyid}";tag="${index.coordinator}"`
  const text = `"@method": POST\n"@path": ${path}\n"@query": ?\n"content-digest": ${sum}\n"@signature-params": ${input}`
  const signature = `sig1=:${sign(null, Buffer.from(text), node.privateKey).toString('base64')}:`
  const headers = { 'content-digest': sum, 'signature-input': `sig1=${input}`, signature } // without a type it is JSON
  return { path, method: 'POST', headers, body }
}
const send = async ({ path, ...request }) => (await fetch(url + path, request)).json()
async function ask(request) {
  const answer = await send(request)
  assert.ok(!answer.code, `${request.path}: ${answer.code}: ${answer.detail}`)
  return answer
}
function unseal(document, kind, publicKey) {
  assert.deepEqual([document.kind, bytesOf(document.public)], [kind, publicKey])
  const key = { key: { kty: 'OKP', crv: 'Ed25519', x: publicKey.toString('base64url') }, format: 'jwk' }
  const payload = bytesOf(document.payload)
  const text = Buffer.concat([Buffer.from(`farflung\0${kind}\0`), payload])
  assert.ok(verify(null, text, key, bytesOf(document.signature)), `the seal of the ${kind} does not verify`)
  return unpack(payload)
}

// ---- a worker's life, as far as it goes without a model
const index = await ask({ path: '/v1' })
const run = index.runs[0]
const descriptor = await ask({ path: `/v1/runs/${run}` })
assert.equal(descriptor.root, index.root) // whoever was told which root to trust compares it here
const delegations = descriptor.delegations.map((sealed) => unseal(sealed, 'delegation', bytesOf(descriptor.root)))
const valid = delegations.filter((delegation) => delegation.run === run && delegation.expires_at > now())
const keys = Object.fromEntries(valid.map((delegation) => [delegation.purpose, delegation.public]))
assert.ok(keys.coordinator && keys.weights)
const info = unseal(descriptor.info, 'run', keys.coordinator)
assert.deepEqual([info.run, info.coordinator, nodeId(keys.coordinator)], [run, index.coordinator, index.coordinator])
async function lease(node, name) {
  await ask(signed(node, '/v1/nodes', { version: index.version, name }))
  setInterval(() => send(signed(node, `/v1/runs/${run}/heartbeat`, {})), info.heartbeat_s * 1000).unref()
  const answer = await ask(signed(node, `/v1/runs/${run}/leases`, { slots: 4, wait_s: 20 }))
  const work = unseal(answer.lease ?? assert.fail('there is no work'), 'lease', keys.coordinator)
  assert.deepEqual([work.node, work.run], [node.id, run])
  const rollouts = work.groups.flatMap((group) => group.samples).map((sample) => sample.rollout)
  return { rollouts, maxNewTokens: work.max_new_tokens, path: `/v1/runs/${run}/leases/${work.lease}/submission` }
}
const [us, them] = [newNode(), newNode()]
const [ours, theirs] = [await lease(us, 'js'), await lease(them, 'js-too')]

// ---- bad manners: what is done, and the status and code that docs/protocol.md has us expect
const inner = Array.from({ length: info.vocab }, (_, id) => id).filter((id) => !info.eos_ids.includes(id))
const madeUp = (count = ours.maxNewTokens) => Array.from({ length: count }, () => inner[randomInt(inner.length)])
const encode = (ids) => Buffer.from(Uint32Array.from(ids).buffer).toString('base64') // on a little-endian machine
const submit = (make, rollouts = ours.rollouts, path = ours.path) =>
  signed(us, path, { rollouts: rollouts.map((rollout) => ({ rollout, ids: encode(make()) })) })
async function refused(what, status, code, request) {
  const refusal = await send(request)
  console.log(`${what}: ${refusal.status} ${refusal.code}: ${refusal.detail}`)
  assert.deepEqual([refusal.status, refusal.code], [status, code])
}
const [cut, others] = [submit(madeUp), ours.rollouts.slice(1)]
await refused('ends too early', 422, 'rejected', submit(() => madeUp(ours.maxNewTokens - 1)))
await refused('never ends', 422, 'rejected', submit(() => madeUp(ours.maxNewTokens + 1)))
await refused('goes on after its end', 422, 'rejected', submit(() => [info.eos_ids[0], ...madeUp(ours.maxNewTokens - 1)]))
await refused('beyond the vocabulary', 422, 'rejected', submit(() => [info.vocab]))
await refused('one rollout is missing', 422, 'rejected', submit(madeUp, others))
await refused("somebody else's rollout", 422, 'rejected', submit(madeUp, [theirs.rollouts[0], ...others]))
await refused("somebody else's lease", 403, 'forbidden', submit(madeUp, theirs.rollouts, theirs.path))
await refused('truncated, then signed', 400, 'malformed', signed(us, cut.path, cut.body.subarray(0, -9)))
await refused('signed, then truncated', 401, 'bad-signature', { ...cut, body: cut.body.subarray(0, -9) })
await refused('a wrong signature', 401, 'bad-signature', signed({ ...them, keyid: us.keyid }, cut.path, cut.body))
await refused('signed long ago', 401, 'clock-skew', signed(us, cut.path, cut.body, now() - 90))
await refused('a key nobody knows', 404, 'not-found', signed(newNode(), `/v1/runs/${run}/leases`, {}))
await refused('a role nobody granted', 403, 'forbidden', signed(us, `/v1/runs/${run}/scores/claim`, {}))

const whole = submit(madeUp) // well-formed, but of a node that never loaded the weights
await refused('no possession of the weights', 422, 'wrong-weights', whole)
await refused('the same request again', 401, 'replayed', whole)
await refused('the lease went to others', 409, 'lease-gone', submit(madeUp))
