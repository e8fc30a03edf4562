// As much msgpack as sealed documents need; where there is a package for it, import that instead.
export function unpack(bytes) {
  let at = 0
  const take = (count) => {
    if (at + count > bytes.length) throw new Error('the document ends too early')
    return bytes.subarray(at, (at += count))
  }
  const uint = (count) => take(count).readUIntBE(0, count)
  const list = (count) => Array.from({ length: count }, item)
  const map = (count) => Object.fromEntries(Array.from({ length: count }, () => [item(), item()]))
  function item() {
    const tag = uint(1)
    if (tag < 0x80) return tag
    if (tag < 0x90) return map(tag & 15)
    if (tag < 0xa0) return list(tag & 15)
    if (tag < 0xc0) return take(tag & 31).toString()
    if (tag === 0xc0) return null
    if (tag === 0xc2 || tag === 0xc3) return tag === 0xc3
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
  if (at !== bytes.length) throw new Error('bytes after the document')
  return value
}
