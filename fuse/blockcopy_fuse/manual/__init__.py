"""The manual: its pages, from the parser and from topic files, for man(1) and as plain text.

    topics/*.md ─► markup ─┐                       ┌─► roff    `blockcopy manual`
    parser, errors, status, wire ─► generated ─► pages ─► text    `blockcopy help`, by pager

A topic file is Markdown, and is named as its page: `blockcopy-state.7.md` is blockcopy-state(7).
"""
