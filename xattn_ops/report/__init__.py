"""One page with everything: what the papers print, what is counted, and what was measured.

html        tables and figures as HTML
sections    the tables of the page
pictures    plots as SVG that takes the page's colours
page        the page
command     ``python -m xattn_ops report``

style.css and sort.js are written into the page, which needs nothing but itself.
"""
