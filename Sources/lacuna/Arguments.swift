// SPDX-License-Identifier: Apache-2.0

/// What the user got wrong or what went wrong, in one line, and the exit status that goes with it.
struct Complaint: Error, CustomStringConvertible {
    let description: String
    let status: Int32
    init(_ description: String, status: Int32 = 1) {
        self.description = description
        self.status = status
    }
    static func usage(_ text: String) -> Complaint { Complaint("\(text); see lacuna --help", status: 2) }
}

/// A command's options: `--name value`, `--name=value` and `--flag`, and its operand, if it takes one.
struct Arguments {
    private var values: [String: String] = [:]
    private var flags: Set<String> = []
    /// The one word that is no option.
    private(set) var operand = ""

    /// `operand` names what has to be given besides the options, for messages.
    init(
        _ words: some Sequence<String>, options: Set<String>, flags allowed: Set<String>, operand what: String? = nil
    ) throws(Complaint) {
        var rest = Array(words)[...]
        while let word = rest.popFirst() {
            if !word.hasPrefix("--"), what != nil, operand.isEmpty {
                operand = word
                continue
            }
            guard word.hasPrefix("--") else { throw .usage("'\(word)' is no option") }
            let parts = word.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            let name = String(parts[0])
            if allowed.contains(name), parts.count == 1 {
                flags.insert(name)
            } else if options.contains(name) {
                guard let value = parts.count == 2 ? String(parts[1]) : rest.popFirst() else {
                    throw .usage("--\(name) needs a value")
                }
                guard values[name] == nil else { throw .usage("--\(name) is given twice") }
                values[name] = value
            } else {
                throw .usage("unknown option \(word)")
            }
        }
        if let what, operand.isEmpty { throw .usage("\(what) is missing") }
    }

    subscript(flag name: String) -> Bool { flags.contains(name) }
    subscript(name: String) -> String? { values[name] }

    func required(_ name: String) throws(Complaint) -> String {
        guard let value = values[name] else { throw .usage("--\(name) is missing") }
        return value
    }

    func integer(_ name: String, in range: ClosedRange<Int>) throws(Complaint) -> Int? {
        guard let text = values[name] else { return nil }
        guard let number = Int(text), range.contains(number) else {
            throw .usage("--\(name) takes a number from \(range.lowerBound) to \(range.upperBound), not '\(text)'")
        }
        return number
    }

    /// Bytes, from a number with an optional K, M, G or T (powers of 1024).
    func size(_ name: String) throws(Complaint) -> UInt64? {
        guard let text = values[name] else { return nil }
        let shifts: [Character: UInt64] = ["K": 10, "M": 20, "G": 30, "T": 40]
        let shift = text.last.flatMap { shifts[Character($0.uppercased())] }
        guard let number = UInt64(shift == nil ? text[...] : text.dropLast()), number <= 1 << 20 || shift == nil,
            (number << (shift ?? 0)) >> (shift ?? 0) == number
        else { throw .usage("--\(name) takes a size such as 512M or 4G, not '\(text)'") }
        return number << (shift ?? 0)
    }
}
