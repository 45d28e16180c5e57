"""A whole service under random faults, and what became of everything that it acknowledged.

python -m tests.chaos --minutes 10 --seed 1 --database postgres --broker celery --out report.json
"""
