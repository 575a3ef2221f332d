"""The style sheet of coverage.html: one column, both colour schemes."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5b6570;--line:#dde2e7;--card:#f4f6f8;
--heat:#1f5fa8;--on-heat:#fff;--exact:#1f5fa8;--pieces:#e09b2d;--empty:#b9c0c7}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e4e8ec;--soft:#98a3ad;--line:#2c333a;--card:#1d2226;
--heat:#7ab8f5;--on-heat:#0d1216;--exact:#7ab8f5;--pieces:#c98a2b;--empty:#4c555e}}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1.2rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .8rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .2rem}
.note{color:var(--soft);margin:.2rem 0 .8rem;font-size:.9rem;max-width:50rem;overflow-wrap:anywhere}
.advice{background:var(--card);border-left:4px solid var(--heat);padding:.7rem 1rem;margin:0 0 1rem}
.advice b{font-size:1.15rem;margin-right:.4rem}
.facts{list-style:none;display:flex;flex-wrap:wrap;gap:.5rem 2rem;padding:0;margin:0 0 1rem}
.facts li{max-width:11rem;color:var(--soft);font-size:.85rem;line-height:1.35}
.facts b{display:block;color:var(--ink);font-size:1.4rem;font-weight:600}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .6rem;text-align:right;white-space:nowrap}
thead th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
tbody th{text-align:left;font-weight:500;padding-left:0}
tbody tr+tr>*{border-top:1px solid var(--line)}
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
code{font:.92em ui-monospace,monospace;background:var(--card);padding:.05rem .25rem;
white-space:pre-wrap;overflow-wrap:anywhere}
small{color:var(--soft)}
"""
