"""Graphemes of several characters, for tests of cuts."""

#: Families, flags, skin tones, accents as separate signs, Hangul jamo, Devanagari and a Kannada prefix.
GRAPHEMES = [
    *("👨‍👩‍👧", "🇨🇳", "👍🏽", "e\u0301", "각", "क्षि", "ಕ್ಷ", "\u0600\u0661"),
    *("a", "宝", "。", "”", "\r\n", " ", "!", "."),
]
