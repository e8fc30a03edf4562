// The seeded noise of docs/protocol.md: what a worker adds to logits / T before it takes the largest.
// All arithmetic is on 32 bits; Math.imul wraps as the document asks, and >>> 0 makes a number unsigned.
const rotated = (x, count) => (x << count) | (x >>> (32 - count))
const scrambled = (word) => Math.imul(rotated(Math.imul(word, 0xcc9e2d51), 15), 0x1b873593)
const absorbed = (state, word) => (Math.imul(rotated(state ^ scrambled(word), 13), 5) + 0xe6546b64) | 0

/** What is left of a seed (a whole number below 2 ** 53) and a position. */
export function rowState(seed, position) {
  return [seed % 2 ** 32, Math.floor(seed / 2 ** 32), position].reduce(absorbed, 0) >>> 0
}

/** The 32 bits of one token in a row. */
export function bits(state, token) {
  let x = absorbed(state, token) ^ 16
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b)
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35)
  return (x ^ (x >>> 16)) >>> 0
}

/** The noise of 32 bits; float32 rounds once, where Math.fround stands. */
export function gumbel(hash) {
  const uniform = Math.fround((hash >>> 16) * 2 ** -16 + ((hash & 0xffff) + 0.5) * 2 ** -32)
  return -Math.log(-Math.log1p(-Math.min(uniform, 1 - 2 ** -24)))
}
