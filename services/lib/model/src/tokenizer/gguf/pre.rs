//! How text is cut before byte-level merges, by `tokenizer.ggml.pre` as llama.cpp names it.
//!
//! Several patterns cut one after another, each what the ones before it left. They are those that the models'
//! `tokenizer.json` has, which llama.cpp writes in forms that its own engine can run.
use serde_json::{Value, json};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BLOOM: &str = " ?[^(\\s|.,!?…。，、।۔،)]+";
const BREAK: &str = r"[\r\n]";
const CJK: &str = "[一-龥ࠀ-一가-퟿]+";
/// Letters with upper and lower case; escaped where a composed form would be another character.
const DEEPSEEK_LETTERS: &str = "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u{1f7d}ᾀ-ᾴᾶ-ᾼ\u{1fbe}ῂ-ῄῆ-ῌῐ-\u{1fd3}ῖ-\u{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u{2126}ℨ\u{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_MARKS: &str = "\\s?[!-/:-~！-／：-～‘-‟　-。]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// How a family cuts text.
pub(super) struct Pre {
    /// The names of the family's values.
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A piece that is a token is that token, whatever the merges make of it.
    pub(super) ignore_merges: bool,
    /// Whether a text starts with the beginning-of-sequence token where the file does not say.
    pub(super) add_bos: bool,
}

const fn plain(names: &'static [&'static str], patterns: &'static [&'static str]) -> Pre {
    Pre { names, patterns, ignore_merges: false, add_bos: false }
}

const KNOWN: &[Pre] = &[
    plain(&["default"], &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    plain(&["gpt-2", "gpt2", "olmo", "phi-2", "mpt"], &[GPT2]),
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    plain(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    plain(&["qwen2", "deepseek-r1-qwen", "stablelm2"], &[QWEN2]),
    Pre { names: &["tekken"], patterns: &[TEKKEN], ignore_merges: true, add_bos: true },
    plain(&["gpt-4o", "llama4"], &[GPT4O]),
    plain(&["starcoder", "refact", "command-r", "smollm"], &[DIGIT, GPT2]),
    plain(&["bloom"], &[BLOOM]),
    plain(&["deepseek-llm"], &[BREAK, DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", CJK, r"\p{N}+"]),
    plain(&["deepseek-coder"], &[BREAK, r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT]),
    plain(&["deepseek-v3"], &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3]),
];

/// What a value of `tokenizer.ggml.pre` stands for.
pub(super) fn find(name: &str) -> Option<&'static Pre> {
    KNOWN.iter().find(|pre| pre.names.contains(&name))
}

/// All values, for messages.
pub(super) fn names() -> String {
    KNOWN.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ")
}

impl Pre {
    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut steps: Vec<Value> = self.patterns.iter().map(split).collect();
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        steps.push(bytes);
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn cut<'a>(name: &str, text: &'a str) -> Vec<&'a str> {
        let json = find(name).unwrap().pre_tokenizer();
        let pre_tokenizer: tokenizers::PreTokenizerWrapper = serde_json::from_value(json).unwrap();
        let mut cut = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut cut).unwrap();
        let pieces = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces.into_iter().map(|(_, (start, end), _)| &text[start..end]).collect()
    }

    #[test]
    fn each_family_cuts_digits_words_and_marks_in_its_way() {
        let text = "Hello world123 4567 don't";
        let cases: [(&[&str], &[&str]); 10] = [
            (&["gpt-2", "olmo"], &["Hello", " world", "123", " 4567", " don", "'t"]),
            (
                &["llama-bpe", "llama3", "falcon3", "dbrx", "glm4"],
                &["Hello", " world", "123", " ", "456", "7", " don", "'t"],
            ),
            (&["qwen2"], &["Hello", " world", "1", "2", "3", " ", "4", "5", "6", "7", " don", "'t"]),
            (&["tekken"], &["Hello", " world", "1", "2", "3", " ", "4", "5", "6", "7", " don", "'t"]),
            (&["starcoder", "refact"], &["Hello", " world", "1", "2", "3", " ", "4", "5", "6", "7", " don", "'t"]),
            (&["gpt-4o"], &["Hello", " world", "123", " ", "456", "7", " don't"]),
            (&["bloom"], &["Hello", " world123", " 4567", " don't"]),
            (&["deepseek-llm"], &["Hello", " world", "123", " ", "4567", " don", "'", "t"]),
            (&["deepseek-v3"], &["Hello", " world", "123", " ", "456", "7", " don", "'t"]),
            (&["default"], &["Hello", " world", "123", " ", "456", "7", " don", "'", "t"]),
        ];
        for (names, expected) in cases {
            for name in names {
                assert_eq!(cut(name, text), expected, "{name}");
            }
        }
        let single = ["Hello", " world", "1", "2", "3", " ", "4", "5", "6", "7", " don", "'", "t"];
        assert_eq!(cut("deepseek-coder", text), single);
    }

    #[test]
    fn case_breaks_and_scripts_cut_where_the_families_say() {
        assert_eq!(cut("tekken", "camelCase A/b\n\n x"), ["camel", "Case", " A", "/b", "\n\n", " x"]);
        assert_eq!(cut("gpt-4o", "HTTPServer's ok"), ["HTTPServer's", " ok"]);
        assert_eq!(cut("llama3", "a\n\n  b"), ["a", "\n\n", " ", " b"]);
        // the family's marks go from ':' to '~', letters of ASCII among them
        assert_eq!(cut("deepseek-llm", "café 混合 a  "), ["caf", "é", " ", "混合", " a", "  "]);
        assert_eq!(cut("deepseek-llm", "ЖЩ ώΩ"), ["ЖЩ", " ώΩ"]);
        assert_eq!(cut("deepseek-llm", "a\nb"), ["a", "\n", "b"]);
        assert_eq!(cut("deepseek-v3", "x.y 混合ab, 1"), ["x", ".y", " ", "混合", "ab", ",", " ", "1"]);
        assert_eq!(cut("bloom", "a, (b) c."), ["a", ", (", "b", ")", " c", "."]);
    }
}
