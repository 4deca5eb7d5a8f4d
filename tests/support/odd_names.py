"""Tensor names as nobody gives them: all that JSON escapes, and text outside ASCII and outside 16 bits."""

from __future__ import annotations

from hypothesis import strategies as st

# A small alphabet: hypothesis needs seconds to set up all of Unicode.
ODD_NAMES = st.text(st.sampled_from('aZ0._/ "\\\b\f\n\r\t\0\x01\x1f\x7f\x80é\u2028日\uffff😀'), max_size=6)
