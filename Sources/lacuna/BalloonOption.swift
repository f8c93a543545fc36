// SPDX-License-Identifier: Apache-2.0
import Balloon
import Machine

/// What `--balloon` says: features, and where the balloon comes from.
struct BalloonOption {
    var features = BalloonFeature.standard
    /// The path of a liblacuna.so.
    var plugin: String?

    /// `FEATURE,…`, `plugin:PATH`, or both with the plugin last: a path may have commas.
    init(parsing text: String?) throws(Complaint) {
        guard let text else { return }
        let mark = "plugin:"
        var list = text[...]
        var place = text.startIndex
        while place < text.endIndex {
            if text[place...].hasPrefix(mark) {
                let path = String(text[place...].dropFirst(mark.count))
                guard !path.isEmpty else { throw .usage("--balloon plugin: needs a path") }
                plugin = path
                list = text[..<place]
                break
            }
            guard let comma = text[place...].firstIndex(of: ",") else { break }
            place = text.index(after: comma)
        }
        if list.last == "," && plugin != nil { list.removeLast() }
        if !list.isEmpty || plugin == nil { features = try balloonFeatures(String(list)) }
    }
}
