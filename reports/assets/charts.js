// Draws the charts of a page: each reads its ECharts option from the JSON beside it when it comes into sight.
(function () {
  "use strict";
  var drawn = [];

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  // Error bars: each datum is [position, low, high] along the value axis; `encode` says which axis that is.
  function interval(params, api) {
    var flat = params.encode.x.length > 1;
    function at(value) {
      return flat ? api.coord([value, api.value(0)]) : api.coord([api.value(0), value]);
    }
    var low = at(api.value(1)), high = at(api.value(2)), half = 4;
    // A fourth number moves the bar across the axis by that many pixels.
    var aside = api.value(3) || 0;
    low[flat ? 1 : 0] += aside;
    high[flat ? 1 : 0] += aside;
    function line(x1, y1, x2, y2) {
      return { type: "line", shape: { x1: x1, y1: y1, x2: x2, y2: y2 }, style: { stroke: api.visual("color"), lineWidth: 1.5 } };
    }
    var caps = flat
      ? [line(low[0], low[1] - half, low[0], low[1] + half), line(high[0], high[1] - half, high[0], high[1] + half)]
      : [line(low[0] - half, low[1], low[0] + half, low[1]), line(high[0] - half, high[1], high[0] + half, high[1])];
    return { type: "group", children: [line(low[0], low[1], high[0], high[1])].concat(caps) };
  }

  // What to say of a point is text of ours; a formatter given as a string would be escaped like HTML.
  function tip(params) {
    return (params.data && params.data.tip) || "";
  }

  function themed(option) {
    option.series.forEach(function (series) {
      if (series.renderItem === "interval") { series.renderItem = interval; }
      if (series.label) {
        // A halo in the colour of the page keeps names legible on lines.
        series.label = Object.assign({ color: colour("ink"), textBorderColor: colour("page"), textBorderWidth: 3 }, series.label);
      }
      [series.itemStyle, series.label].forEach(function (style) {
        ["color", "borderColor"].forEach(function (what) {
          if (style && style[what] === "ink") { style[what] = colour("ink"); }
        });
      });
    });
    option.textStyle = { fontFamily: getComputedStyle(document.body).fontFamily, color: colour("ink") };
    option.backgroundColor = "transparent";
    option.animation = false;
    option.tooltip = Object.assign({ renderMode: "richText", confine: true, backgroundColor: colour("raised"),
      borderColor: colour("strong"), textStyle: { color: colour("ink"), fontSize: 12 } }, option.tooltip);
    if (option.tooltip.formatter === "tip") { option.tooltip.formatter = tip; }
    ["xAxis", "yAxis"].forEach(function (key) {
      [].concat(option[key] || []).forEach(function (axis) {
        var line = { lineStyle: { color: colour("strong") } };
        axis.axisLine = Object.assign({}, line, axis.axisLine);
        axis.axisTick = Object.assign({}, line, axis.axisTick);
        axis.splitLine = Object.assign({ lineStyle: { color: colour("rule") } }, axis.splitLine);
        axis.axisLabel = Object.assign({ color: colour("soft") }, axis.axisLabel);
        axis.nameTextStyle = Object.assign({ color: colour("soft") }, axis.nameTextStyle);
      });
    });
    if (option.legend) { option.legend.textStyle = { color: colour("ink") }; }
    if (option.visualMap) { option.visualMap.textStyle = { color: colour("soft") }; }
    return option;
  }

  function draw(figure) {
    var place = figure.querySelector(".plot");
    var chart = echarts.getInstanceByDom(place) || echarts.init(place, null, { renderer: "svg" });
    chart.setOption(themed(JSON.parse(figure.querySelector("script").textContent)), true);
    if (drawn.indexOf(figure) < 0) {
      drawn.push(figure);
      chart.on("click", function (event) {
        if (event.data && event.data.link) { location.href = event.data.link; }
      });
      new ResizeObserver(function () { chart.resize(); }).observe(place);
    }
  }

  var seen = new IntersectionObserver(function (entries) {
    entries.filter(function (entry) { return entry.isIntersecting; }).forEach(function (entry) {
      seen.unobserve(entry.target);
      draw(entry.target);
    });
  }, { rootMargin: "200px" });
  var figures = document.querySelectorAll("figure.chart");
  figures.forEach(function (figure) {
    // Room is made before anything is drawn, so that the page does not jump.
    var place = figure.querySelector(".plot");
    place.style.height = place.dataset.height + "px";
    if (place.dataset.width) { place.style.minWidth = place.dataset.width + "px"; }
    seen.observe(figure);
  });

  // Paper shows all of them, in the colours of paper.
  addEventListener("beforeprint", function () { figures.forEach(draw); });
  document.addEventListener("themechange", function () { drawn.forEach(draw); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () { drawn.forEach(draw); });
})();
