"use strict";
(() => {
  const spoken = document.querySelector(".spoken[role=status]");

  function show(plot, tip, text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const room = plot.clientWidth - tip.offsetWidth - 4;
    tip.style.left = Math.max(0, Math.min(x + 14, room)) + "px";
    tip.style.top = Math.max(0, y) + "px";
  }

  function nearest(values, wanted) {
    let best = 0;
    values.forEach((value, i) => {
      if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i;
    });
    return best;
  }

  function chart(plot) {
    const data = JSON.parse(plot.dataset.chart);
    const svg = plot.querySelector("svg");
    const tip = plot.querySelector(".tip");
    const cursor = svg.querySelector(".cursor");
    const [low, high, start, stop] = data.x;
    const hidden = new Set();
    const stops = [...new Set(data.series.flatMap((each) => each.x))].sort((a, b) => a - b);
    let place = -1;

    function read(x) {
      const lines = [];
      data.series.forEach((each, i) => {
        if (hidden.has(i)) return;
        const k = nearest(each.x, x);
        lines.push(each.name + "  " + each.y[k].toLocaleString("en") +
          "  at " + each.x[k].toLocaleString("en"));
      });
      return lines;
    }

    function point(x, aloud) {
      const pixel = start + (x - low) / (high - low) * (stop - start);
      cursor.setAttribute("x1", pixel);
      cursor.setAttribute("x2", pixel);
      cursor.setAttribute("visibility", "visible");
      const lines = read(x);
      show(plot, tip, lines.join("\n"), pixel * svg.clientWidth / svg.viewBox.baseVal.width, 8);
      if (aloud) spoken.textContent = lines.join("; ");
    }

    function leave() {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    }

    plot.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const pixel = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      const x = low + (pixel - start) / (stop - start) * (high - low);
      point(Math.max(low, Math.min(high, x)), false);
    });
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("blur", leave);
    plot.addEventListener("keydown", (event) => {
      const last = stops.length - 1;
      const moves = {
        ArrowLeft: place < 0 ? last : place - 1, ArrowRight: place + 1, Home: 0, End: last,
      };
      if (event.key === "Escape") leave();
      if (!(event.key in moves)) return;
      event.preventDefault();
      place = Math.max(0, Math.min(last, moves[event.key]));
      point(stops[place], true);
    });

    plot.parentElement.querySelectorAll("button[data-line]").forEach((button) => {
      button.addEventListener("click", () => {
        const line = Number(button.dataset.line);
        const isShown = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", String(!isShown));
        if (isShown) hidden.add(line); else hidden.delete(line);
        svg.querySelector('g[data-line="' + line + '"]').style.display = isShown ? "none" : "";
      });
    });
  }

  function heat(plot) {
    const cells = JSON.parse(plot.dataset.cells);
    const columns = Number(plot.dataset.columns);
    const tip = plot.querySelector(".tip");
    plot.addEventListener("pointermove", (event) => {
      const box = plot.querySelector("svg").getBoundingClientRect();
      const side = box.width / columns;
      const column = Math.floor((event.clientX - box.left) / side);
      const unit = Math.floor((event.clientY - box.top) / side) * columns + column;
      if (column < 0 || column >= columns || !(unit in cells)) {
        tip.hidden = true;
        return;
      }
      show(plot, tip, "unit " + unit + "  " + cells[unit], event.clientX - box.left,
        event.clientY - box.top + 18);
    });
    plot.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  document.querySelectorAll("[data-chart]").forEach(chart);
  document.querySelectorAll("[data-cells]").forEach(heat);
})();
