"""The style sheet of coverage.html, beside what all pages have: one column, both colour schemes."""

STYLE = """
:root{--exact:#1f5fa8;--pieces:#e09b2d;--empty:#b9c0c7}
@media(prefers-color-scheme:dark){:root{--exact:#7ab8f5;--pieces:#c98a2b;--empty:#4c555e}}
.advice{background:var(--card);border-left:4px solid var(--heat);padding:.7rem 1rem;margin:0 0 1rem}
.advice b{font-size:1.15rem;margin-right:.4rem}
.heat{border-spacing:2px;border-collapse:separate}
.heat th,.heat tr+tr>*{border:0}
.heat td{min-width:3rem;padding:.35rem .3rem;text-align:center;position:relative;z-index:0}
.heat td[style]::before{content:"";position:absolute;inset:0;z-index:-1;background:var(--heat);opacity:var(--share)}
.heat td.full{color:var(--on-heat)}
.heat .zero{color:var(--empty)}
.heat thead th{vertical-align:bottom;padding:.2rem 0;text-align:center;font-size:.76rem}
.heat thead span{display:block;width:4.5rem;white-space:normal;line-height:1.15}
.legend{display:block;margin:.6rem 0 0}
.legend text{fill:var(--soft);font-size:12px}
.legend rect{stroke:var(--line)}
rect.exact{fill:var(--exact)}rect.pieces{fill:var(--pieces)}rect.empty{fill:var(--empty)}
.examples thead th,.examples td{text-align:left;white-space:normal;vertical-align:top}
.examples td:nth-child(2){color:var(--soft)}
"""
