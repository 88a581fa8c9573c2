# docker build -t surm-seg .                                   CPU
# docker build -t surm-seg --build-arg DEVICE=cuda .           CUDA (torch brings its own libraries)
# docker run --rm --read-only --tmpfs /tmp --user "$(id -u):$(id -g)" -v "$PWD:/home/surm" surm-seg train
# docker run ... --network host surm-seg app --no-browser      the viewer, on the host's loopback address alone
FROM python:3.11-slim

ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 SURM_CACHE=/tmp/surm-seg MPLCONFIGDIR=/tmp/matplotlib

RUN useradd --create-home --uid 10001 surm
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY surm_seg /src/surm_seg
COPY pipelines /src/pipelines
COPY app /src/app
RUN if [ "$DEVICE" = cpu ]; then \
        pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0; \
    fi \
    && pip install --constraint /src/constraints.txt /src \
    && rm -rf /src

USER 10001
WORKDIR /home/surm
ENTRYPOINT ["surm-seg"]
CMD ["--help"]
