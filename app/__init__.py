"""The clinician's viewer: a Streamlit app on the loopback address, and the only package that knows Streamlit."""
