"""The template of ``report.html``, a page that fetches nothing."""

__all__ = ["PAGE"]

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scaling study: {{ tasks | map(attribute="name") | join(", ") }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 13px; margin: 0.8em 0; }
.wide { overflow-x: auto; }
th, td { border: 1px solid #ddd; padding: 3px 8px; text-align: right; white-space: nowrap; }
th, td.text { text-align: left; } th { background: #f3f3f3; }
img { max-width: 100%; height: auto; display: block; margin: 0.8em 0; }
.verdict { background: #f3f7fb; border-left: 4px solid #0072b2; padding: 0.6em 1em; }
.verdict p { margin: 0.3em 0; } .verdict ul { margin: 0.2em 0 0.8em; font-size: 13px; }
.note { background: #fff6e5; border-left: 4px solid #e69f00; padding: 0.6em 1em; }
.small { color: #555; font-size: 13px; }
pre { white-space: pre-wrap; background: #f3f3f3; padding: 0.6em 1em; font-size: 13px; }
details { margin: 0.8em 0; } summary { cursor: pointer; }
</style>
</head>
<body>
<h1>Scaling study</h1>
<p>{{ arms | join(", ") }}; batch sizes {{ config.batch_sizes | join(", ") }};
{{ config.steps }} steps, {{ config.schedule }} learning rate; {{ config.trials }} tuning trials per
arm and batch size; {{ config.seeds }} evaluation seeds.
{{ finished }} of {{ total }} trials are finished. {{ dates }} {{ version }}</p>
<p>The command that repeats it:</p>
<pre class="command">{{ command }}</pre>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
{% for task in tasks %}
<h2 id="{{ task.name }}">{{ task.name }}</h2>
<p>{{ task.text }}. Score: {{ task.score }}, {{ task.better }} is better.</p>
<div class="verdict">
{% for arm, summary, lines in task.verdict %}
<p><b>{{ arm }}</b> {{ summary }}</p>
<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>
{% else %}<p>No Grad Queue arm has finished here.</p>{% endfor %}
</div>
{% for picture in task.pictures %}
<img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.data }}">
{% endfor %}
<h3>Tuned settings and results</h3>
<div class="wide"><table>
<tr>{% for name in task.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in task.rows %}<tr>{% for cell in row %}
<td{% if loop.first or loop.last %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<details><summary>Paired differences, every comparison</summary><div class="wide"><table>
<tr>{% for name in task.pair_columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in task.pairs %}<tr>{% for cell in row %}
<td{% if loop.index in (1, 3) %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div></details>
{% endfor %}
<h2>How to read this</h2>
<p>Every arm got the same number of tuning trials at every batch size, from one quasi-random
sequence of learning rate, beta1 (with SGD the momentum) and warm-up. Grad Queue's own settings, rho
and queue length, got no trials of their own. The settings with the best mean validation score ran
on fresh seeds, the same for all arms, so differences are paired: same data, same initial weights,
same order. Test data was looked at once per run, at its end. A diverged run has the score of
chance.
"Steps to target" are the steps to the first look at the validation data from which on the score
stays at the target; a run that never stays there has infinitely many.</p>
<p>Intervals of differences and scores are bootstrap percentiles of the mean over seeds, widened for
few seeds (Hesterberg 2015). They cover the choice of seeds, not that of the tuned settings. The
intervals of the verdicts share an error of 5&nbsp;% over all Grad Queue arms and batch sizes of a
task (Bonferroni); each is the wider of the bootstrap's and Student's.
<i>Helps</i> means better than the tuned baseline, the primary control, and the controls
lower-momentum and lead. The primary control is a step of the same length: on SGD one longer by the
measured norm ratio; on Adam, which divides by the gradient's size, the same learning rate.
<i>Better, but no more than</i> names the control that does as well.
<i>Hurts</i> means worse than the tuned baseline.
<i>Undecided</i> means that the difference's own 95&nbsp;% interval excludes 0, but not the wider
one of the verdict. <i>Not enough trials</i> means that the study is too small for verdicts.
<i>No difference</i> means that these seeds show none; the interval says how large a difference may
still be.</p>
<p>Controls are not tuned: they run at the arm's own tuned settings with one thing changed. What an
arm does no better than is listed after "not beyond".</p>
<details><summary>Controls</summary><table>
{% for name, text in controls %}<tr><td class="text">{{ name }}</td><td class="text">{{ text }}</td>
</tr>{% endfor %}</table></details>
<details><summary>Configuration (study.toml)</summary><pre>{{ toml }}</pre></details>
<h2>Where it ran</h2>
<table>{% for name, values in environment %}
<tr><td class="text">{{ name }}</td><td class="text">{{ values }}</td></tr>
{% endfor %}</table>
<p class="small">Rows per seed: results.csv. Seconds: timing.csv; they are those of this machine,
with whatever else ran on it.</p>
</body>
</html>
"""
