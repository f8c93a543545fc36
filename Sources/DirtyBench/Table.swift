// SPDX-License-Identifier: Apache-2.0

/// Why a benchmark could not be run, or what it found wrong.
public struct BenchError: Error, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

/// One figure or name in a table.
public enum BenchValue: Sendable, Equatable {
    case text(String)
    case count(Int)
    /// Shown with so many decimals.
    case number(Double, decimals: Int)

    static func us(_ nanoseconds: UInt64) -> BenchValue { .number(Double(nanoseconds) / 1e3, decimals: 0) }
    static func ms(_ nanoseconds: UInt64) -> BenchValue { .number(Double(nanoseconds) / 1e6, decimals: 2) }

    var shown: String {
        switch self {
        case .text(let text): return text
        case .count(let count): return String(count)
        case .number(let value, let decimals):
            let scale = (0..<decimals).reduce(1.0) { scale, _ in scale * 10 }
            let scaled = (abs(value) * scale).rounded()
            guard scaled < 1e15 else { return "\(value)" }
            let digits = String(Int(scaled)), sign = value < 0 && scaled > 0 ? "-" : ""
            if decimals == 0 { return sign + digits }
            let padded = String(repeating: "0", count: max(0, decimals + 1 - digits.count)) + digits
            return sign + padded.dropLast(decimals) + "." + padded.suffix(decimals)
        }
    }

    var json: String {
        if case .text(let text) = self { return quoted(text) }
        return shown
    }
}

/// A benchmark's result: named columns, rows, and what was found wrong.
public struct BenchTable: Sendable {
    public let name: String
    public let columns: [String]
    public private(set) var rows: [[BenchValue]] = []
    /// Limits that were missed, in words. Empty: all is well.
    public var misses: [String] = []

    init(_ name: String, columns: [String]) {
        self.name = name
        self.columns = columns
    }

    mutating func add(_ row: [BenchValue]) {
        precondition(row.count == columns.count)
        rows.append(row)
    }

    /// For people: columns aligned, names to the left, figures to the right.
    public var text: String {
        let cells = [columns] + rows.map { $0.map(\.shown) }
        let widths = columns.indices.map { column in cells.map { $0[column].count }.max() ?? 0 }
        func isText(_ column: Int) -> Bool {
            if case .text? = rows.first?[column] { return true }
            return false
        }
        return cells.map { row in
            let line = row.enumerated().map { column, cell in
                let padding = String(repeating: " ", count: widths[column] - cell.count)
                return isText(column) ? cell + padding : padding + cell
            }.joined(separator: "  ")
            return String(line.reversed().drop { $0 == " " }.reversed())
        }.joined(separator: "\n") + "\n"
    }

    /// `{"name": …, "rows": [{column: value, …}, …], "misses": […]}`
    public var json: String {
        let rows = rows.map { row in
            "    {" + zip(columns, row).map { "\(quoted($0)): \($1.json)" }.joined(separator: ", ") + "}"
        }
        return "{\n  \"name\": \(quoted(name)),\n  \"rows\": [\n" + rows.joined(separator: ",\n") + "\n  ],\n  \"misses\": ["
            + misses.map(quoted).joined(separator: ", ") + "]\n}\n"
    }
}

/// A JSON string. The texts here are our own and hold no control characters but line ends.
private func quoted(_ text: String) -> String {
    var result = "\""
    for character in text.unicodeScalars {
        switch character {
        case "\"", "\\": result += "\\" + String(character)
        case "\n": result += "\\n"
        default: result.unicodeScalars.append(character)
        }
    }
    return result + "\""
}
