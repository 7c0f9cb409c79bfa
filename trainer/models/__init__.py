"""The LSTM, the encoder, the models trained on it, and the bundles that hold them."""
