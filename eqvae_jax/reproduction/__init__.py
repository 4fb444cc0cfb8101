"""The paper's tables and figures as plans of this project's own commands, and what their numbers say of its claims.

stages     one command each, known by what decides its result        bench      the stages that experiments are made of
running    many of them: several at a time, kept, gone on with       tables     the paper's tables; figures: its figures
estimates  time and disk before the first                            claims     what the numbers say of a claim
scales     smoke, tiny, small, photos, paper                         document   the result as Markdown, HTML and JSON
recipe     the paper's scale as a script, and its cost               provenance what a reader needs to judge a result
"""
