"""Trains a recurrent encoder on unlabelled text, and an LSTM classifier that starts from it.

The rooms by floor. A room imports only from floors below its own (tests/test_architecture.py;
docs/how-it-works.md has a sentence for each):

    8  main
    7  stages
    6  preflight, states
    5  training, inference, report_page
    4  models
    3  losses, reporting
    2  distribution, mirror
    1  config, native, safe_files
"""
