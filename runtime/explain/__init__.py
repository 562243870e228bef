"""The explorer: what each pass did, what it cost, and whether to believe it.

fixtures.py   prompts, and their steps alone and batched, by prefill and by decode
compare.py    log-probabilities of two runs, and how far apart they are
subjects.py   the oracle, the stages of a column, a compiled artifact, as things to run
report.py     all of it as one JSON-able report
page.py       the report as one HTML page; drawing.py, charts.py its pictures
verify.py     the stamp of an artifact
bisect.py     the first guilty pass, layer and node; repro.py a script that shows it
diff.py       two artifacts against each other
"""
