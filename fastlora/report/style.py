"""Looks of the page and of its pictures, and the few lines that let a pointer read values off a curve."""

from __future__ import annotations

import re

_LIGHT = """--paper:#ffffff;--page:#f6f7f9;--ink:#1c2430;--soft:#5b6675;--line:#e3e7ec;--axis:#9aa5b1;--accent:#0b63b5;
--mark:#fff3d6;--c0:#0b63b5;--c1:#d1490c;--c2:#0a8f62;--c3:#b8498f;--c4:#8a6d00;--c5:#3a9ad9;--rest:#c3cad3;
--cold:#eaf2fb;--hot:#084a91;--on-cold:#1c2430;--on-hot:#ffffff"""
_DARK = """--paper:#1b212a;--page:#12161c;--ink:#e8ecf1;--soft:#9fabb9;--line:#303946;--axis:#66727f;--accent:#6cb4f5;
--mark:#3a3114;--c0:#6cb4f5;--c1:#ff8d55;--c2:#3fcf9a;--c3:#e88bc4;--c4:#dcbc3d;--c5:#a9d8ff;--rest:#4a5563;
--cold:#22303f;--hot:#8fc7ff;--on-cold:#e8ecf1;--on-hot:#10161d"""

_KINDS = ("c0", "c1", "c2", "c3", "c4", "c5", "rest")

MARKS = """
.chart text{font:11px system-ui,sans-serif;fill:var(--soft)}.chart .label{font-size:11.5px}
.chart .value{fill:var(--on-cold);font-size:10.5px}.chart .value.on-dark{fill:var(--on-hot)}
.rule{stroke:var(--line);fill:none}.axis{stroke:var(--axis);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.line.raw{stroke-width:1;opacity:.3}
.line.rest{stroke-width:1.2}.dot{stroke:var(--paper);stroke-width:1.2}
.cell{fill:color-mix(in srgb,var(--hot) calc(var(--s)*100%),var(--cold));stroke:var(--paper);stroke-width:.6}
""" + "".join(f".line.{c}{{stroke:var(--{c})}}.dot.{c}{{fill:var(--{c})}}" for c in _KINDS)

_COLOURS = dict(re.findall(r"--([\w-]+):(#\w+)", _LIGHT))
PICTURE = re.sub(r"\.cell\{[^;]*;", ".cell{", ".paper{fill:var(--paper)}" + MARKS)
PICTURE = re.sub(r"var\(--([\w-]+)\)", lambda match: _COLOURS[match[1]], PICTURE)
"""What a picture needs that stands alone: no custom properties, which many viewers do not know."""

PAGE = f"""
:root{{{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}html{{-webkit-text-size-adjust:100%}}
body{{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}}
main{{max-width:1280px;margin:0 auto;padding:28px 24px 56px}}
h1{{font-size:28px;line-height:1.2;margin:0 0 8px}}h2{{font-size:19px;margin:36px 0 12px}}
header p{{margin:0;max-width:75ch;color:var(--ink);overflow-wrap:anywhere}}.note,small{{color:var(--soft)}}
.note{{font-size:14px;margin:12px 0 6px}}small{{font-size:12.5px;font-weight:400}}
dl{{margin:0}}dd{{margin:0}}dt{{color:var(--soft);font-size:13px}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:10px;margin-top:16px}}
.note+.tiles{{margin-top:0}}
.tiles div{{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:10px 12px}}
.tiles dd{{font-size:18px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}}
.tiles div{{display:flex;flex-direction:column;justify-content:space-between}}
.figures{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px}}
figure{{margin:0;background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:12px 12px 8px;
min-width:0}}
figcaption{{font-weight:600;font-size:15px;margin:0 2px 8px}}figcaption small{{display:block}}
.pairs{{grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr))}}
.pairs .chart{{max-width:460px;margin:0 auto}}.chart{{display:block;width:100%;height:auto;touch-action:pan-y}}
.readout{{margin:4px 2px 0;font-size:12.5px;min-height:1.5em;color:var(--soft);font-variant-numeric:tabular-nums}}
.readout b{{font-weight:600;color:var(--ink)}}
.cursor{{stroke:var(--axis);stroke-dasharray:3 3;pointer-events:none}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 12px;padding:8px 0;font-size:14px;
position:sticky;top:0;background:var(--page);z-index:1}}
.swatch{{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:7px;vertical-align:-1px}}
.scroll{{overflow-x:auto;background:var(--paper);border:1px solid var(--line);border-radius:10px}}
table{{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{padding:8px 9.5px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}}
thead th{{border-top:0;color:var(--soft);font-weight:500;vertical-align:bottom}}
th:first-child{{text-align:left;position:sticky;left:0;background:var(--paper);border-right:1px solid var(--line)}}
tbody th{{font-weight:500;max-width:46vw;white-space:normal;overflow-wrap:anywhere;min-width:8em}}
td.differs{{background:var(--mark)}}
details{{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:10px 14px;margin-bottom:10px}}
summary{{cursor:pointer}}.settings{{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:8px 20px;
margin-top:12px}}.settings dd,details li{{overflow-wrap:anywhere;font-size:14px}}
@media (max-width:600px){{main{{padding:18px 14px 40px}}h1{{font-size:23px}}h2{{margin-top:28px}}
.tiles{{grid-template-columns:1fr 1fr;gap:8px}}.tiles div{{padding:8px 11px}}.tiles dd{{font-size:16px}}
th,td{{padding:8px 9px}}figure{{padding:10px 8px 6px}}}}
@media print{{body{{background:none}}.legend{{position:static}}figure{{break-inside:avoid}}}}
{MARKS}
""" + "".join(f".swatch.{c}{{background:var(--{c})}}" for c in _KINDS)

SCRIPT = """
document.querySelectorAll('svg[data-values]').forEach(function(svg){
  var data=JSON.parse(svg.dataset.values),out=svg.parentNode.querySelector('.readout'),line=null;
  var width=svg.viewBox.baseVal.width,height=svg.viewBox.baseVal.height;
  function say(text,bold){var e=document.createElement(bold?'b':'span');e.textContent=text;out.appendChild(e)}
  function show(event){
    var box=svg.getBoundingClientRect(),at=(event.clientX-box.left)/box.width*width;
    var step=data.x[0]+(at-data.x[2])/(data.x[3]-data.x[2])*(data.x[1]-data.x[0]),nearest=null;
    data.s.forEach(function(s){s.p.forEach(function(p){
      if(nearest===null||Math.abs(p[0]-step)<Math.abs(nearest-step))nearest=p[0]})});
    if(nearest===null)return;
    var x=data.x[2]+(nearest-data.x[0])/((data.x[1]-data.x[0])||1)*(data.x[3]-data.x[2]);
    if(!line){line=document.createElementNS('http://www.w3.org/2000/svg','path');line.setAttribute('class','cursor');
      svg.appendChild(line)}
    line.setAttribute('d','M'+x+' 10V'+(height-36));
    out.textContent='';say('step '+nearest+'  ');
    data.s.forEach(function(s){
      var best=null;s.p.forEach(function(p){if(!best||Math.abs(p[0]-nearest)<Math.abs(best[0]-nearest))best=p});
      if(best){if(data.s.length>1)say(s.n+' ');say(best[1]+'  ',true)}});
  }
  function hide(){out.textContent='';if(line){line.remove();line=null}}
  svg.addEventListener('pointermove',show);svg.addEventListener('pointerdown',show);
  svg.addEventListener('pointerleave',hide);
});
"""
